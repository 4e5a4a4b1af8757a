"""What the training commands train: each objective's checks, data, model, task, result and next command."""

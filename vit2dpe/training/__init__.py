"""One training loop for any task: settings, engine, checkpoints, run folder."""

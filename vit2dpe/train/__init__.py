"""Training: data, augmentation, the engine, checkpoints and reports."""

"""Problems that the training loop can train, one file a task."""

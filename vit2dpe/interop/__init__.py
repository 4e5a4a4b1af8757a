"""Checkpoints of other libraries, read into our models and written back."""

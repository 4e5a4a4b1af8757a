"""Models of transformers to ours."""

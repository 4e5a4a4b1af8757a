"""Text encoders, decoders and sequence to sequence models."""

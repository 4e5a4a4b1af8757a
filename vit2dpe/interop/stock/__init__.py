"""Weights of torch's own Transformer, in and out."""

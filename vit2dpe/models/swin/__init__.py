"""Swin V1 and V2 with any encoding that serves in windows."""

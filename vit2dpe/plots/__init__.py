"""Pictures of encodings, attention, text and reconstructions."""

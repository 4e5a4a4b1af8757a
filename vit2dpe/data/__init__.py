"""Image and text files as uint8 batches and token ids. Imports the ground floor only, no models."""

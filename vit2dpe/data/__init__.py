"""Files and words to uint8 batches and token ids. Imports the ground floor alone and knows no model."""

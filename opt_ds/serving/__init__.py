"""Serving of a trained model: raw samples in, text or images out; and export to Hugging Face's layout."""

"""A trained model for users: one raw sample in, text or a picture out; export to Hugging Face's layout."""

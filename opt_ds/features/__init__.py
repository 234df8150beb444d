"""Feature extractors: convert images, speech and text to the features that a store holds."""

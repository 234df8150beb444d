"""Feature extractors: images, speech and text -> what a store holds."""

"""Layers that the model and the tasks are built from."""

"""The network: embedders, cross-modal encoder, decoders, and `OPT`, which joins them to the tasks' heads."""

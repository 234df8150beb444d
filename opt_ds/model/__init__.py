"""The network: embedders, cross-modal encoder, decoders, and `OPT`, which combines them with the tasks' heads."""

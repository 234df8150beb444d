"""opt_ds: pre-train, evaluate and serve the Omni-Perception Pre-Trainer (OPT, arXiv 2107.00249) with DeepSpeed."""

__version__ = "0.1.0"

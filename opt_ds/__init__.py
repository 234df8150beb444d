"""opt_ds: pre-train, evaluate and serve the Omni-Perception Pre-Trainer (OPT, arXiv 2107.00249) with DeepSpeed."""

from opt_ds.version import __version__ as __version__

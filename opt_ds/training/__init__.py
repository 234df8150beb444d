"""Training engine: DeepSpeed with the package's own batch arithmetic, checkpoints, metrics and training loop."""

"""The training engine: DeepSpeed under our own batch arithmetic, checkpoints, metrics and loop."""

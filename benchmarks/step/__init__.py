"""Parts of `benchmarks/train_step.py`: the samples, the methods that are compared, their work, and the measurement."""

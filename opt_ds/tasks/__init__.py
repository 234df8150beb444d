"""The pre-training tasks, one file each: head, positions that it reads, loss sum, count and metrics."""

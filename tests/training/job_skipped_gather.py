"""One of two ranks under a watch over their collectives; rank 1 leaves a gather out. See test_collectives.py."""

from datetime import timedelta

import torch
from torch import distributed

from opt_ds.training.collectives import CollectiveWatch, end_process

if __name__ == "__main__":
    distributed.init_process_group("gloo", timeout=timedelta(seconds=200))
    rank = distributed.get_rank()
    CollectiveWatch(rank, 2, still_s=2.0, fail=end_process(rank))
    distributed.all_reduce(torch.ones(7))
    if rank == 0:
        distributed.all_gather_into_tensor(torch.empty(200), torch.ones(100))
    distributed.all_reduce(torch.ones(50))

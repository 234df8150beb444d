"""Matching of several captions: the true one must have the highest score among the candidates of its image or audio.

Legend: c candidates of a batch, g groups, k candidates of the largest group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from opt_ds.data.layout import Layout, as_long
from opt_ds.data.sample import Sample
from opt_ds.ops.movable import Movable
from opt_ds.tasks.base import LossTerm
from opt_ds.tasks.caption_negatives import CaptionCandidate


@dataclass
class CandidateBatch(Movable):
    """Candidates of a batch, group by group."""

    index: torch.Tensor  # int64 [c], packed positions of [CLS]
    labels: torch.Tensor  # int64 [c], matching labels
    rows: torch.Tensor  # int64 [c], index of the group
    columns: torch.Tensor  # int64 [c], index within the group
    truth: torch.Tensor  # int64 [g], index of the true caption within its group
    largest: int  # k


def collate_candidates(samples: Sequence[Sample], name: str, layout: Layout) -> CandidateBatch:
    """Return the candidates among the samples' targets `name`.

    The step plan keeps groups complete. Of a single sample, which is read to find the cause of a loss that is not
    finite, the first candidate stands for the true one.
    """
    found = [(i, target) for i, sample in enumerate(samples) if isinstance(target := sample.targets.get(name), CaptionCandidate)]
    found.sort(key=lambda item: (item[1].group, item[1].number))
    groups = np.array([target.group for _, target in found], dtype=np.int64)
    begins = np.flatnonzero(np.diff(groups, prepend=-1))
    sizes = np.diff(np.append(begins, len(groups)))
    return CandidateBatch(
        index=as_long(layout.starts[[i for i, _ in found]]),
        labels=as_long([target.label for _, target in found]),
        rows=as_long(np.repeat(np.arange(len(begins)), sizes)),
        columns=as_long(np.arange(len(groups)) - np.repeat(begins, sizes)),
        truth=torch.zeros(len(begins), dtype=torch.int64),
        largest=int(sizes.max(initial=0)),
    )


def candidates_term(scores_c: torch.Tensor, candidates: CandidateBatch) -> LossTerm:
    """Return the summed softmax cross-entropy over the candidates of each group.

    "correct" counts the groups whose true caption has the highest score. Equal scores count in part, as if one of them
    were chosen at random.

    Args:
        scores_c: Scores of the candidates, fp32.
        candidates: The candidates.

    Returns:
        The term. It counts groups.
    """
    if not len(candidates.truth):
        return LossTerm(scores_c.sum(), 0.0, {"correct": scores_c.new_zeros(())})
    nothing = scores_c.new_full((len(candidates.truth), candidates.largest), float("-inf"))
    scores_gk = nothing.index_put((candidates.rows, candidates.columns), scores_c)
    loss = F.cross_entropy(scores_gk, candidates.truth, reduction="sum")
    scores_gk = scores_gk.detach()
    is_best = scores_gk == scores_gk.amax(1, keepdim=True)
    correct = (is_best.gather(1, candidates.truth[:, None]).squeeze(1) / is_best.sum(1)).sum()
    return LossTerm(loss, float(len(candidates.truth)), {"correct": correct})

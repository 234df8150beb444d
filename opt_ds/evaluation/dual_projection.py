"""Dual projection of frozen [CLS] vectors: two linear maps into one space, in which candidates are ranked by cosine.

It is fitted after pre-training with symmetric InfoNCE (van den Oord et al. 2018; Radford et al. 2021) on the training
split, with early stopping on the validation split's loss.

Legend: q queries, c candidates, n pairs, e width of [CLS], d width of the projection.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Pairs:
    """[CLS] of queries and of their targets, float32 [n, e]; target_names int [n] are equal for equal targets."""

    query_ne: np.ndarray
    target_ne: np.ndarray
    target_names: np.ndarray


class DualProjection(nn.Module):
    """Two linear projections. Scores are cosines divided by a learned temperature."""

    def __init__(self, fitted_on: Pairs, width: int) -> None:
        super().__init__()
        e = fitted_on.query_ne.shape[1]
        self.query, self.target = nn.Linear(e, width), nn.Linear(e, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.of_query, self.of_target = _statistics(fitted_on.query_ne), _statistics(fitted_on.target_ne)

    def forward(self, query_qe: torch.Tensor, target_ce: torch.Tensor) -> torch.Tensor:
        """Return scores [q, c]."""
        (query_mean, query_std), (target_mean, target_std) = self.of_query, self.of_target
        query_qd = F.normalize(self.query((query_qe - query_mean) / query_std), dim=-1)
        target_cd = F.normalize(self.target((target_ce - target_mean) / target_std), dim=-1)
        return query_qd @ target_cd.T * self.log_scale.exp().clamp_max(100)

    @torch.inference_mode()
    def scores(self, query_qe: np.ndarray, target_ce: np.ndarray) -> np.ndarray:
        """Return scores of NumPy vectors, float32 [q, c]."""
        return self(torch.from_numpy(query_qe), torch.from_numpy(target_ce)).numpy()


def _statistics(vectors_ne: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation, each [e]."""
    return torch.from_numpy(vectors_ne.mean(0)), torch.from_numpy(vectors_ne.std(0)).clamp_min(1e-6)


def fit_dual_projection(
    train: Pairs, valid: Pairs, width: int = 128, steps: int = 2000, batch: int = 256, patience: int = 10, seed: int = 1
) -> DualProjection:
    """Fit a projection. The result is a function of the arguments alone.

    Args:
        train: Pairs to fit on.
        valid: Pairs whose loss is evaluated every 20 steps.
        width: Width of the projection.
        steps: Maximum number of steps.
        batch: Pairs per step.
        patience: Number of evaluations without improvement after which fitting stops.
        seed: Seed of the initialisation and of the batches.

    Returns:
        The projection with the weights of the best evaluation, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        projection = DualProjection(train, width)
        optimizer = torch.optim.AdamW(projection.parameters(), lr=2e-3, weight_decay=0.1)
        best, kept, waited = float("inf"), projection.state_dict(), 0
        choice = np.random.default_rng(seed)
        for step in range(1, steps + 1):
            part = choice.choice(len(train.query_ne), min(batch, len(train.query_ne)), replace=False)
            loss = _contrastive_loss(projection, train, part)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20:
                continue
            with torch.no_grad():
                found = float(_contrastive_loss(projection, valid, np.arange(len(valid.query_ne))))
            waited += 1
            if found < best:
                best, waited = found, 0
                kept = {name: value.clone() for name, value in projection.state_dict().items()}
            if waited >= patience:
                break
        projection.load_state_dict(kept)
    return projection.eval()


def _contrastive_loss(projection: DualProjection, pairs: Pairs, part: np.ndarray) -> torch.Tensor:
    """Return the symmetric InfoNCE loss. Another pair with the same target is not used as a negative."""
    scores = projection(torch.from_numpy(pairs.query_ne[part]), torch.from_numpy(pairs.target_ne[part]))
    names = pairs.target_names[part]
    same = torch.from_numpy((names[:, None] == names[None, :]) & ~np.eye(len(part), dtype=bool))
    scores = scores.masked_fill(same, float("-inf"))
    truth = torch.arange(len(part))
    return (F.cross_entropy(scores, truth) + F.cross_entropy(scores.T, truth)) / 2

"""Test k-means: separated clusters are found, and equal input gives equal centroids."""

import itertools

import torch

from opt_ds.ops.kmeans import kmeans, nearest


def keyed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kmeans_finds_separated_clusters_and_never_loses_a_centroid() -> None:
    centres = torch.tensor(list(itertools.product([0.0, 10.0], repeat=3)))
    vectors = (centres[:, None] + 0.1 * torch.randn(8, 50, 3, generator=keyed(0))).flatten(0, 1)
    found = kmeans(vectors, 24, 10, keyed(1))
    assert len(nearest(centres, found).unique()) == 8
    assert (found[nearest(vectors, found)] - vectors).square().sum(1).max() < 1.0
    repeated = torch.cat([vectors[:1].expand(500, 3), centres])
    assert torch.isfinite(kmeans(repeated, 8, 5, keyed(2))).all()
    assert torch.equal(found, kmeans(vectors, 24, 10, keyed(1)))

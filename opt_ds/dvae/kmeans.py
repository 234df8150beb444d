"""Lloyd's k-means on vectors, which starts the dVAE's codebook: runs where its input lies, repeatable by its generator.

Shapes: m vectors, d values each, k centroids.
"""

import torch
from torch import Tensor

CHUNK = 4096  # vectors whose distances to all centroids are held at once


def nearest(vectors_md: Tensor, centroids_kd: Tensor) -> Tensor:
    """Return int64 [m]: the index of each vector's nearest centroid (squared Euclidean distance)."""
    half_norms_k = centroids_kd.square().sum(1) / 2
    parts = [(half_norms_k - part_md @ centroids_kd.T).argmin(1) for part_md in vectors_md.split(CHUNK)]
    return torch.cat(parts)


def kmeans(vectors_md: Tensor, num_centroids: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Return float32 centroids [k, d] after Lloyd iterations from a random draw of the vectors (Forgy's start).

    A centroid that lost all its vectors restarts at a randomly drawn vector. Needs m >= k; `generator` is a CPU one.
    """
    num_vectors = len(vectors_md)
    assert num_vectors >= num_centroids, (num_vectors, num_centroids)
    drawn = torch.randperm(num_vectors, generator=generator)[:num_centroids]
    centroids_kd = vectors_md[drawn.to(vectors_md.device)].clone()
    for _ in range(iterations):
        label_m = nearest(vectors_md, centroids_kd)
        # A one-hot product would be k × m; index_add_ on a GPU adds in any order, so sums there are not bit-stable.
        sums_kd = torch.zeros_like(centroids_kd).index_add_(0, label_m, vectors_md)
        counts_k = torch.bincount(label_m, minlength=num_centroids)
        restart = torch.randint(num_vectors, (num_centroids,), generator=generator).to(vectors_md.device)
        alive_k1 = (counts_k > 0)[:, None]
        centroids_kd = torch.where(alive_k1, sums_kd / counts_k.clamp(min=1)[:, None], vectors_md[restart])
    return centroids_kd

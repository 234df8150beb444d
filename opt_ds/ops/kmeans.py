"""Lloyd's k-means, for the dVAE's codebook and the labels of image regions. It runs on the device of its input.

It is reproducible: equal vectors, threads and generators give equal centroids.

Shape letters: m vectors, d values per vector, k centroids.
"""

import torch
from torch import Tensor

CHUNK = 4096  # vectors per chunk; the distances of a chunk to all centroids are in memory at once


def nearest(vectors_md: Tensor, centroids_kd: Tensor) -> Tensor:
    """Return the index of each vector's nearest centroid (squared Euclidean distance), int64 [m]."""
    half_norms_k = centroids_kd.square().sum(1) / 2
    parts = [(half_norms_k - part_md @ centroids_kd.T).argmin(1) for part_md in vectors_md.split(CHUNK)]
    return torch.cat(parts)


def kmeans(vectors_md: Tensor, num_centroids: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Run k-means, starting from a random sample of the vectors (Forgy initialisation).

    A centroid without vectors is reset to a random vector.

    Args:
        vectors_md: Vectors, float32 [m, d]; m >= k.
        num_centroids: Number of centroids k.
        iterations: Number of Lloyd iterations.
        generator: A CPU generator.

    Returns:
        Centroids, float32 [k, d].
    """
    num_vectors = len(vectors_md)
    assert num_vectors >= num_centroids, (num_vectors, num_centroids)
    drawn = torch.randperm(num_vectors, generator=generator)[:num_centroids]
    centroids_kd = vectors_md[drawn.to(vectors_md.device)].clone()
    for _ in range(iterations):
        label_m = nearest(vectors_md, centroids_kd)
        # A one-hot product would need k × m values. On a GPU index_add_ sums in any order, so its sums are not
        # bit-stable.
        sums_kd = torch.zeros_like(centroids_kd).index_add_(0, label_m, vectors_md)
        counts_k = torch.bincount(label_m, minlength=num_centroids)
        restart = torch.randint(num_vectors, (num_centroids,), generator=generator).to(vectors_md.device)
        alive_k1 = (counts_k > 0)[:, None]
        centroids_kd = torch.where(alive_k1, sums_kd / counts_k.clamp(min=1)[:, None], vectors_md[restart])
    return centroids_kd

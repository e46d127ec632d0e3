"""Hierarchical k-means: a tree of centroids that says for any vector which cluster it falls into, coarse to fine.

The router of hierarchical memories (Pouransari et al., arXiv:2510.02375): every cluster is parted into k again, p deep,
and a vector goes down greedily, to the nearest of k centroids at each level: p * k comparisons for k ** p leaves.
Exact distances, a seed for every draw: the same vectors give the same tree. Left out: clusters of balanced size.

Shapes: N vectors, D width, k branching, p depth, P levels of a path.
"""

import torch
from torch import Tensor, nn

MAX_ROUNDS = 100


class ClusterTree(nn.Module):
    """Centroids of p levels, of which a node's children are the next level's rows k * node to k * node + k - 1.

    Args:
        branching: k.
        depth: p.
        width: D.

    Raises:
        ValueError: ``branching`` or ``depth`` is below 1.
    """

    def __init__(self, branching: int, depth: int, width: int):
        super().__init__()
        if branching < 1 or depth < 1:
            raise ValueError(f"branching is {branching} and depth {depth}: both must be at least 1")
        self.branching, self.depth = branching, depth
        for level in range(1, depth + 1):  # infinitely far: no vector goes there
            self.register_buffer(f"level{level}", torch.full((branching**level, width), torch.inf))

    @torch.no_grad()
    def fit(self, vectors_ND: Tensor, seed: int = 0) -> "ClusterTree":
        """Part the vectors, level by level; a cluster of fewer than k distinct vectors has fewer children.

        Raises:
            ValueError: there is no vector, one is not finite, or they are of another width.
        """
        width = self.level1.shape[1]
        if vectors_ND.ndim != 2 or not len(vectors_ND) or vectors_ND.shape[1] != width:
            raise ValueError(f"vectors have shape {tuple(vectors_ND.shape)}, must be (one or more, {width})")
        if wrong := int((~vectors_ND.isfinite().all(1)).sum()):
            raise ValueError(f"{wrong} of {len(vectors_ND)} vectors are not finite")
        generator = torch.Generator().manual_seed(seed)
        vectors_ND = vectors_ND.double().cpu()
        node_N = torch.zeros(len(vectors_ND), dtype=torch.int64)
        for level in range(1, self.depth + 1):
            centroids = self.get_buffer(f"level{level}")
            for node in node_N.unique().tolist():
                found = k_means(vectors_ND[node_N == node], self.branching, generator)
                first = node * self.branching
                centroids[first : first + len(found)] = found.to(centroids)
            node_N = self.forward(vectors_ND)[:, level - 1]
        return self

    @torch.no_grad()
    def forward(self, vectors_ND: Tensor) -> Tensor:
        """The path of each vector: its node of every level, int64, shape (N, P)."""
        node_N, path = torch.zeros(len(vectors_ND), dtype=torch.int64, device=vectors_ND.device), []
        children_k = torch.arange(self.branching, device=vectors_ND.device)
        for level in range(1, self.depth + 1):
            below_Nk = node_N[:, None] * self.branching + children_k
            centroids_NkD = self.get_buffer(f"level{level}").to(vectors_ND.device)[below_Nk].double()
            distance_Nk = (centroids_NkD - vectors_ND[:, None].double()).square().sum(-1)
            node_N = below_Nk.gather(1, distance_Nk.argmin(1, keepdim=True))[:, 0]
            path.append(node_N)
        return torch.stack(path, dim=1)


def routing_agreement(one_NP: Tensor, other_NP: Tensor) -> list[float]:
    """Of pairs of paths, such as a document's and that of a question about it, the share that agree down to each level.

    Raises:
        ValueError: there is no pair, or they are not as many or not as deep.
    """
    if one_NP.shape != other_NP.shape or not len(one_NP):
        raise ValueError(f"paths of shapes {tuple(one_NP.shape)} and {tuple(other_NP.shape)} are no pairs")
    return (one_NP == other_NP).double().mean(0).tolist()  # a node has one way up


def k_means(vectors_ND: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm from a k-means++ start (Arthur and Vassilvitskii, 2007), to the end.

    Returns:
        the centroids, ``number`` of them or as many as there are distinct vectors; each is the mean of its vectors.
    """
    centroids_kD = _spread(vectors_ND, number, generator)
    nearest_N = None
    for _ in range(MAX_ROUNDS):
        before, nearest_N = nearest_N, _squares(vectors_ND, centroids_kD).argmin(1)
        if before is not None and torch.equal(before, nearest_N):
            break
        centroids_kD = torch.stack([vectors_ND[nearest_N == each].mean(0) for each in nearest_N.unique()])
        nearest_N = nearest_N.unique(return_inverse=True)[1]  # a centroid that lost its vectors is gone
    return centroids_kD


def _spread(vectors_ND: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Vectors drawn one after the other, each by its squared distance from those drawn before."""
    drawn = [torch.randint(len(vectors_ND), (1,), generator=generator)]
    while len(drawn) < number:
        distance_N = _squares(vectors_ND, vectors_ND[torch.cat(drawn)]).amin(1)
        if not distance_N.any():
            break  # every vector is drawn already, or is equal to one that is
        drawn.append(torch.multinomial(distance_N, 1, generator=generator))
    return vectors_ND[torch.cat(drawn)]


def _squares(vectors_ND: Tensor, centroids_kD: Tensor) -> Tensor:
    """Squared distances (N, k), exact: sums of squared differences."""
    return torch.cdist(vectors_ND, centroids_kD, compute_mode="donot_use_mm_for_euclid_dist").square()

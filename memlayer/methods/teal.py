"""TEAL: which few examples to keep for replay, the most typical of each cluster first.

Clusters are found anew at each of a few growing budgets, and each gives its most typical example that is not chosen
yet. So what is chosen first covers what is common, outliers come last, and a buffer that has to shrink keeps the
beginning. Distances between all pairs of a cluster are held at once.

Source: Shaul-Ariel and Weinshall, arXiv:2407.00673, and its released code; made for images, whose classes are groups
of examples here (a relation, a source). The paper's: typicality as one over the mean squared distance to the nearest
neighbours within the cluster, budgets that grow by a factor of 1.4 from 3 on, no clusters of 5 or fewer, from each
cluster the most typical first, groups sharing the budget evenly. Ours: k-means of our own in numpy, started by
k-means++ from a seed over examples in the order of their features, so that the order they come in does not matter; and
that a group whose clusters are all too small is one cluster, where the code has none.

Shapes: N examples, D features, C clusters.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

SPARSE = 0.2  # share of a group above which a budget gets fewer clusters than examples
FEWER = 5  # so many times fewer
MOST_CLUSTERS = 500
FIRST_BUDGET = 4  # as a power of the base


def typicality(features_ND: np.ndarray, clusters_N: np.ndarray, neighbours: int = 20) -> np.ndarray:
    """One over the mean squared distance to the nearest neighbours of the same cluster, half the cluster at most."""
    typical_N = np.zeros(len(features_ND))
    for cluster in np.unique(clusters_N):
        places = np.flatnonzero(clusters_N == cluster)
        count = max(1, min(neighbours, len(places) // 2))
        distances = _distances(features_ND[places], features_ND[places])
        np.fill_diagonal(distances, np.inf)
        nearest = np.sort(distances, 1)[:, :count]
        typical_N[places] = 1 / (nearest.mean(1) + 1e-5) if len(places) > 1 else 0.0
    return typical_N


def k_means(features_ND: np.ndarray, clusters: int, seed: int, rounds: int = 50) -> np.ndarray:
    """The cluster of each example, by Lloyd's rounds from a k-means++ start; deterministic by seed.

    Raises:
        ValueError: there are not between one and as many clusters as examples.
    """
    if not 1 <= clusters <= len(features_ND):
        raise ValueError(f"{clusters} clusters of {len(features_ND)} examples")
    draw = np.random.default_rng(seed)
    centres_CD = features_ND[[draw.integers(len(features_ND))]]
    while len(centres_CD) < clusters:
        weights_N = _distances(features_ND, centres_CD).min(1)
        chances = weights_N / weights_N.sum() if weights_N.sum() > 0 else None
        centres_CD = np.vstack([centres_CD, features_ND[draw.choice(len(features_ND), p=chances)]])
    clusters_N = np.full(len(features_ND), -1)
    for _ in range(rounds):
        nearest_N = _distances(features_ND, centres_CD).argmin(1)
        if (nearest_N == clusters_N).all():
            break
        clusters_N = nearest_N
        for cluster in np.unique(clusters_N):  # an empty one keeps its centre
            centres_CD[cluster] = features_ND[clusters_N == cluster].mean(0)
    return clusters_N


def budgets(budget: int, base: float = 1.4) -> list[int]:
    """The growing budgets at which clusters are found anew; the last one is ``budget``."""
    steps = math.log(budget, base) + 1
    grown = [int(base**power) for power in range(FIRST_BUDGET, math.ceil(steps))]
    return sorted({each for each in grown if each < budget} | {budget})


def teal_order(
    features_ND: np.ndarray,
    budget: int,
    *,
    neighbours: int = 20,
    base: float = 1.4,
    min_cluster: int = 6,
    seed: int = 0,
) -> list[int]:
    """The examples of one group to keep, the first to keep first.

    Args:
        features_ND: what examples are compared by, such as mean hidden states of the trained model.
        budget: how many to keep; all, where there are fewer.
        neighbours: at most so many tell how typical an example is.
        base: by what factor budgets grow.
        min_cluster: smaller clusters are left out, as outliers are.
        seed: of where k-means starts.

    Raises:
        ValueError: features are no finite matrix, the budget is below 0, or another number outside its range.
    """
    features_ND = np.asarray(features_ND, dtype=np.float64)
    if features_ND.ndim != 2 or not np.isfinite(features_ND).all():
        raise ValueError(f"features of shape {features_ND.shape} must be a matrix of finite numbers")
    if budget < 0 or neighbours < 1 or base <= 1 or min_cluster < 1:
        raise ValueError(
            f"budget={budget}, neighbours={neighbours}, base={base}, min_cluster={min_cluster}: "
            "the budget is 0 or more, the base above 1, the others at least 1"
        )
    budget, chosen = min(budget, len(features_ND)), []
    in_order_N = np.lexsort(features_ND.T[::-1])
    features_ND = features_ND[in_order_N]
    features_ND = features_ND - features_ND.mean(0) if budget else features_ND
    for wanted in budgets(budget, base) if budget else []:
        few = wanted / len(features_ND) < SPARSE
        clusters = min(MOST_CLUSTERS, max(1, wanted if few else wanted // FEWER))
        clusters_N = k_means(features_ND, clusters, seed)
        _choose(chosen, wanted, clusters_N, typicality(features_ND, clusters_N, neighbours), min_cluster)
    return in_order_N[chosen].tolist() if chosen else []


def _choose(chosen: list[int], wanted: int, clusters_N: np.ndarray, typical_N: np.ndarray, min_cluster: int) -> None:
    """Choose until there are as many as wanted, from large clusters without many chosen ones first, then around."""
    sizes = np.bincount(clusters_N)
    taking = [int(cluster) for cluster in np.flatnonzero(sizes >= min_cluster)]
    if not taking:
        taking, clusters_N, sizes = [0], np.zeros_like(clusters_N), np.array([len(clusters_N)])
    already = np.bincount(clusters_N[chosen], minlength=len(sizes)) if chosen else np.zeros(len(sizes), int)
    taking.sort(key=lambda cluster: (already[cluster], -sizes[cluster], cluster))
    ranked = {
        cluster: sorted(set(np.flatnonzero(clusters_N == cluster).tolist()) - {*chosen}, key=lambda n: -typical_N[n])
        for cluster in taking
    }
    while len(chosen) < wanted:
        left = [cluster for cluster in taking if ranked[cluster]]
        if not left:  # what is left lies in small clusters
            rest = sorted(set(range(len(clusters_N))) - {*chosen}, key=lambda n: (-typical_N[n], n))
            chosen += rest[: wanted - len(chosen)]
        for cluster in left[: wanted - len(chosen)]:
            chosen.append(ranked[cluster].pop(0))


def even_shares(sizes: Mapping[Hashable, int], budget: int) -> dict[Hashable, int]:
    """How many examples of each group a budget holds: as even as can be, what is left over to the first groups.

    A group with fewer examples leaves its part to the others.
    """
    share = dict.fromkeys(sizes, 0)
    while budget > 0 and (growing := [group for group in sizes if share[group] < sizes[group]][:budget]):
        for group in growing:
            share[group] += 1
        budget -= len(growing)
    return share


def teal_select(features_ND: np.ndarray, groups: Sequence[Hashable], budget: int, **settings) -> list[int]:
    """The examples to keep of all groups, in the order in which to keep them: each group's first, then their second.

    Args:
        features_ND: of each example.
        groups: the group of each example.
        budget: how many to keep of all.
        settings: of ``teal_order``.

    Raises:
        ValueError: there are not as many groups as features, or what ``teal_order`` refuses.
    """
    features_ND, kept = np.asarray(features_ND), []
    if len(groups) != len(features_ND):
        raise ValueError(f"{len(features_ND)} examples have features, {len(groups)} a group")
    for number, (group, share) in enumerate(even_shares(Counter(groups), budget).items()):
        places = [place for place, each in enumerate(groups) if each == group]
        order = teal_order(features_ND[places], share, **settings)
        kept += [(rank, number, places[index]) for rank, index in enumerate(order)]
    return [place for _rank, _number, place in sorted(kept)]


def _distances(one_ND: np.ndarray, other_MD: np.ndarray) -> np.ndarray:
    """Squared, between each two."""
    squares = (one_ND**2).sum(1)[:, None] + (other_MD**2).sum(1)[None] - 2 * one_ND @ other_MD.T
    return np.maximum(squares, 0)

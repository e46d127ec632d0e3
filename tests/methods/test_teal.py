"""TEAL covers clusters, leaves outliers for last, and does not mind the order in which examples come."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.methods.teal import budgets, even_shares, k_means, teal_order, teal_select, typicality


def mixture(clusters=4, each=20, outliers=4, seed=0):
    """Tight clusters far apart, then outliers farther away; and the cluster of each, -1 of an outlier."""
    draw = np.random.default_rng(seed)
    centres = 10 * np.eye(clusters, 5)
    points = np.concatenate([centre + 0.3 * draw.normal(size=(each, 5)) for centre in centres])
    far = 60 * draw.normal(size=(outliers, 5))
    return np.concatenate([points, far]), np.repeat([*range(clusters), -1], [each] * clusters + [outliers])


@pytest.mark.parametrize("budget", [4, 6, 9, 16])
def test_a_budget_of_as_many_as_there_are_clusters_covers_them_without_outliers(budget):
    features, clusters = mixture(outliers=0)
    assert set(clusters[teal_order(features, budget)]) == {0, 1, 2, 3}
    features, clusters = mixture()
    assert -1 not in clusters[teal_order(features, budget)]


def test_random_choices_are_worse_by_the_same_measure():
    features, clusters = mixture()
    draws = [np.random.default_rng(seed).permutation(len(features))[:4] for seed in range(50)]
    assert sum(set(clusters[places]) == {0, 1, 2, 3} for places in draws) < 10


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**16), st.integers(0, 40))
def test_the_order_of_examples_does_not_matter(seed, budget):
    features, _ = mixture(3, 10, 2)
    order = np.random.default_rng(seed).permutation(len(features))
    assert order[teal_order(features[order], budget)].tolist() == teal_order(features, budget)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 30), st.integers(0, 40), st.integers(1, 8))
def test_as_many_as_asked_for_are_chosen_once_each(number, budget, min_cluster):
    features = np.random.default_rng(number).normal(size=(number, 3)).round(0)  # some are equal
    order = teal_order(features, budget, min_cluster=min_cluster)
    assert len(set(order)) == len(order) == min(number, budget)


def test_typicality_is_as_loops_have_it():
    features, clusters = mixture(2, 7, 1)
    for place, found in enumerate(typicality(features, clusters, neighbours=2)):
        same = [each for each in range(len(features)) if clusters[each] == clusters[place] and each != place]
        nearest = sorted(float(((features[each] - features[place]) ** 2).sum()) for each in same)[
            : min(2, (len(same) + 1) // 2)
        ]
        expected = 1 / (sum(nearest) / len(nearest) + 1e-5) if nearest else 0
        assert found == pytest.approx(expected, rel=1e-6)  # float64


def test_k_means_finds_the_clusters_and_depends_on_its_seed_alone():
    features, clusters = mixture(outliers=0)
    found = k_means(features, 4, seed=0)
    assert (found == k_means(features, 4, seed=0)).all()
    assert len({(one, other) for one, other in zip(found, clusters)}) == 4
    assert set(k_means(features, len(features), seed=1)) == set(range(len(features)))
    assert set(k_means(np.zeros((3, 2)), 2, seed=0)) == {0}, "equal examples are in one cluster"


@pytest.mark.parametrize(("budget", "steps"), [(1, [1]), (2, [2]), (3, [3]), (5, [3, 5]), (20, [3, 5, 7, 10, 14, 20])])
def test_budgets_grow_by_the_base(budget, steps):
    assert budgets(budget) == steps
    assert steps[:-1] == [int(1.4**i) for i in range(4, 30) if i < math.log(budget, 1.4) + 1 and int(1.4**i) < budget]


@given(st.dictionaries(st.integers(), st.integers(0, 9), max_size=6), st.integers(0, 40))
def test_shares_are_even_and_use_the_budget(sizes, budget):
    share = even_shares(sizes, budget)
    assert sum(share.values()) == min(budget, sum(sizes.values()))
    assert all(0 <= share[group] <= size for group, size in sizes.items())
    most = max(share.values(), default=0)
    assert all(share[group] in (most, most - 1, size) for group, size in sizes.items())


def test_groups_share_the_budget_and_their_first_examples_come_first():
    features, clusters = mixture(2, 12, 0)
    groups = [("a", "b")[cluster] for cluster in clusters]
    chosen = teal_select(features, groups, 6)
    assert [groups[place] for place in chosen] == ["a", "b"] * 3
    alone = [[place for place, each in enumerate(groups) if each == group] for group in "ab"]
    firsts = [places[teal_order(features[places], 3)[0]] for places in alone]
    assert chosen[:2] == firsts


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: teal_order(np.zeros(3), 1), "must be a matrix"),
        (lambda: teal_order(np.full((3, 2), np.nan), 1), "finite"),
        (lambda: teal_order(np.zeros((3, 2)), -1), "budget=-1"),
        (lambda: teal_order(np.zeros((3, 2)), 1, base=1.0), "base=1.0"),
        (lambda: teal_select(np.zeros((3, 2)), ["a"], 1), "3 examples have features, 1 a group"),
        (lambda: k_means(np.zeros((3, 2)), 4, 0), "4 clusters of 3"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

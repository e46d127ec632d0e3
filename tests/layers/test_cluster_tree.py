"""A tree of clusters parts vectors as k-means does, and a vector goes down it to the nearest child at every level."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlayer.layers.cluster_tree import ClusterTree, k_means, routing_agreement


def vectors(number, seed, width=3):
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def descend(tree, vector_D):
    """One level after the other, one child after the other."""
    node, path = 0, []
    for level in range(1, tree.depth + 1):
        centroids = tree.get_buffer(f"level{level}")
        children = range(node * tree.branching, (node + 1) * tree.branching)
        node = min(children, key=lambda child: math.dist(vector_D.tolist(), centroids[child].tolist()))
        path.append(node)
    return path


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_vector_goes_down_to_the_nearest_child_at_every_level(number, branching, depth, seed):
    tree = ClusterTree(branching, depth, 3).fit(vectors(number, seed))
    asked_ND = torch.cat([vectors(number, seed), vectors(5, seed + 1)])
    path_NP = tree(asked_ND)
    assert path_NP.tolist() == [descend(tree, vector_D) for vector_D in asked_ND]
    assert (path_NP[:, 1:] // branching == path_NP[:, :-1]).all(), "each node is a child of the one before"


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
def test_each_centroid_is_the_mean_of_the_vectors_nearest_to_it(number, branching, seed):
    told_ND = vectors(number, seed).double()
    centroids_kD = k_means(told_ND, branching, torch.Generator().manual_seed(seed))
    assert 1 <= len(centroids_kD) <= min(number, branching)
    nearest_N = torch.tensor(
        [min(range(len(centroids_kD)), key=lambda k: math.dist(v, centroids_kD[k])) for v in told_ND]
    )
    for each, centroid_D in enumerate(centroids_kD):
        torch.testing.assert_close(told_ND[nearest_N == each].mean(0), centroid_D)


def test_vectors_that_lie_apart_are_told_apart_at_both_levels():
    coarse, fine = torch.tensor([[-100.0, 0, 0], [100, 0, 0]]), torch.tensor([[0, -10.0, 0], [0, 10, 0]])
    centres = (coarse[:, None] + fine[None]).reshape(4, 3)
    told_ND = centres.repeat_interleave(25, 0) + vectors(100, 0)
    path_NP = ClusterTree(2, 2, 3).fit(told_ND)(told_ND)
    assert path_NP.view(4, 25, 2).unique(dim=1).shape == (4, 1, 2), "one path a centre"
    assert len(path_NP[:, 1].unique()) == 4
    assert path_NP[:50, 0].unique().tolist() != path_NP[50:, 0].unique().tolist()


def test_the_same_vectors_and_seed_give_the_same_tree():
    told_ND = vectors(60, 1)
    state = torch.random.get_rng_state()
    one, other = (ClusterTree(3, 2, 3).fit(told_ND, seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator is left as found"


def test_equal_vectors_are_one_cluster():
    tree = ClusterTree(3, 2, 3).fit(torch.ones(5, 3))
    assert tree(torch.ones(1, 3)).tolist() == [[0, 0]]
    assert int(tree.level2.isfinite().all(1).sum()) == 1


def test_agreement_is_the_share_of_paths_that_go_together_so_far():
    one_NP, other_NP = torch.tensor([[0, 1], [1, 2], [1, 3], [0, 0]]), torch.tensor([[0, 1], [1, 3], [0, 1], [0, 0]])
    assert routing_agreement(one_NP, other_NP) == [0.75, 0.5]
    with pytest.raises(ValueError, match=r"paths of shapes \(4, 2\) and \(3, 2\) are no pairs"):
        routing_agreement(one_NP, other_NP[:3])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ClusterTree(0, 1, 3), "branching is 0 and depth 1"),
        (
            lambda: ClusterTree(2, 1, 3).fit(torch.ones(0, 3)),
            r"vectors have shape \(0, 3\), must be \(one or more, 3\)",
        ),
        (lambda: ClusterTree(2, 1, 3).fit(torch.ones(4, 2)), r"vectors have shape \(4, 2\)"),
        (lambda: ClusterTree(2, 1, 1).fit(torch.tensor([[1.0], [math.nan]])), "1 of 2 vectors are not finite"),
    ],
)
def test_a_tree_that_cannot_be_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()

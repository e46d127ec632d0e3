"""Each policy keeps what it says; a shrinking buffer keeps the beginning of each group's order."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlayer.methods.replay_buffer import POLICIES, ReplayBuffer, herding_order
from memlayer.methods.teal import teal_order

BY_GROUP = [policy for policy in POLICIES if policy != "reservoir"]


def features_of(group, number=12):
    return np.random.default_rng(group).normal(size=(number, 3))


def filled(policy, groups, budget=12, seed=0):
    buffer = ReplayBuffer(budget, policy, seed)
    for group in range(groups):
        buffer.add(group, [(group, place) for place in range(12)], features_of(group))
    return buffer


@pytest.mark.parametrize("policy", BY_GROUP)
@pytest.mark.parametrize("groups", [1, 2, 3, 5, 20])
def test_groups_share_the_buffer_and_keep_their_beginning(policy, groups):
    now, before = filled(policy, groups).examples, filled(policy, groups - 1).examples
    counts = Counter(group for group, _ in now)
    assert sum(counts.values()) == 12
    assert max(counts.values()) - min(counts.values()) <= 1
    for group in range(groups - 1):
        kept, had = ([example for example in each if example[0] == group] for each in (now, before))
        assert kept == had[: len(kept)]
    assert now == filled(policy, groups).examples


def test_the_orders_are_those_of_their_policies():
    for policy, order in (("herding", herding_order), ("teal", teal_order)):
        assert filled(policy, 1, budget=5).examples == [(0, place) for place in order(features_of(0), 5)]
    assert filled("random", 1, seed=1).examples != filled("random", 1, seed=2).examples


@given(st.integers(0, 2**16), st.integers(0, 6))
def test_herding_takes_what_brings_the_mean_nearest(seed, budget):
    features = np.random.default_rng(seed).normal(size=(6, 2))
    chosen = herding_order(features, budget)
    assert len(chosen) == budget
    for number in range(budget):
        gaps = {
            place: np.linalg.norm(features[[*chosen[:number], place]].mean(0) - features.mean(0))
            for place in range(6)
            if place not in chosen[:number]
        }
        assert gaps[chosen[number]] == pytest.approx(min(gaps.values()))


def test_a_reservoir_keeps_each_example_with_the_same_chance():
    kept = Counter()
    for seed in range(2000):
        buffer = ReplayBuffer(4, "reservoir", seed)
        buffer.add("a", range(3))
        buffer.add("b", range(3, 10))
        assert len(set(buffer.examples)) == 4
        kept.update(buffer.examples)
    assert all(abs(kept[example] / 2000 - 0.4) < 0.05 for example in range(10))  # 4.5 standard deviations


def test_a_sample_is_of_what_is_kept():
    buffer = filled("random", 3)
    assert set(buffer.sample(5, random.Random(0))) < set(buffer.examples)
    assert sorted(buffer.sample(99, random.Random(0))) == sorted(buffer.examples)
    assert ReplayBuffer(3).sample(2, random.Random(0)) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ReplayBuffer(0), "budget=0"),
        (lambda: ReplayBuffer(1, "fifo"), "policy='fifo'"),
        (lambda: filled("random", 2).add(1, ["x"]), "group 1 is in the buffer already"),
        (lambda: ReplayBuffer(2, "teal").add(0, ["x"]), "needs features of 1 examples, there are none"),
        (lambda: ReplayBuffer(2, "herding").add(0, ["x"], np.zeros((2, 2))), "of 1 examples, there are 2"),
    ],
)
def test_what_cannot_be_kept_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""Groups start from the same weights and meet at their mean."""

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memlayer.methods.reptile import consolidation_rate, reptile_step, towards_mean


def sgd(rate, steps=1):
    def train(model, batch):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(steps):
            model(**tiny.inputs(batch)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_one_group_at_rate_one_is_plain_training():
    one, other = tiny.decoder(), tiny.decoder()
    reptile_step(one, [tiny.batch()], sgd(0.1), 1.0)
    sgd(0.1)(other, tiny.batch())
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)  # float32: start + (end - start)


def test_at_rate_zero_the_model_is_as_it_was():
    model = tiny.decoder()
    reptile_step(model, [tiny.batch(), tiny.batch(seed=1)], sgd(0.1), 0.0)
    assert same(model, tiny.decoder())


def test_every_group_starts_where_the_model_was():
    model, starts = tiny.decoder(), []

    def train(model, group):
        starts.append(model.get_parameter("model.norm.weight").detach().clone())
        sgd(0.1)(model, group)

    reptile_step(model, [tiny.batch(seed=seed) for seed in range(3)], train, 0.5)
    assert all(torch.equal(start, torch.ones(tiny.WIDTH)) for start in starts)
    assert not same(model, tiny.decoder())


class Point(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)


@settings(deadline=None, max_examples=8)
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=4), st.floats(0.2, 1))
def test_on_quadratics_it_comes_to_the_mean_of_their_bottoms(bottoms, rate):
    model = Point(3.0)

    def train(model, bottom):
        (gradient,) = torch.autograd.grad((model.at - bottom) ** 2 / 2, model.at)
        with torch.no_grad():
            model.at -= 0.5 * gradient

    for _ in range(150):
        reptile_step(model, bottoms, train, rate)
    assert float(model.at.detach()) == pytest.approx(sum(bottoms) / len(bottoms), abs=1e-4)


def test_the_mean_is_as_written_out():
    start = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0], dtype=torch.bfloat16)}
    ends = [
        {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([8.0])},
        {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([4.0])},
    ]
    moved = towards_mean(start, ends, 0.5)
    assert moved["a"].tolist() == [1.5, 1.5]
    assert (moved["b"].tolist(), moved["b"].dtype) == ([5.0], torch.bfloat16)


def test_the_rate_falls_with_what_was_learned():
    assert [consolidation_rate(1.0, done, 4) for done in (0, 2, 4)] == [1.0, math.exp(-0.5), math.exp(-1)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: reptile_step(Point(0.0), [], None, 1.0), "0 groups"),
        (lambda: reptile_step(Point(0.0), [1], None, 1.5), "rate 1.5"),
        (lambda: consolidation_rate(1.0, 5, 4), "done=5, total=4"),
        (lambda: towards_mean({"a": torch.zeros(1)}, [{"b": torch.zeros(1)}], 1.0), "each with the same names"),
    ],
)
def test_what_has_no_mean_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""Bits against numbers worked out by hand; no number leaves its radius; the two ends are free and frozen."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlayer.methods.trust_region import (
    MOST_BITS,
    TrustRegion,
    averaged_fisher,
    fisher_prior,
    information_bits,
    per_row,
    project,
    radius,
)


@given(st.floats(0, 1e6), st.floats(1e-6, 1e3), st.integers(0, 5))
def test_bits_are_the_gain_of_information(fisher, prior, tasks):
    gain = 0.5 * math.log2((fisher + (tasks + 1) * prior) / ((tasks + 2) * prior))
    found = int(information_bits(torch.tensor([fisher], dtype=torch.float64), prior, tasks))
    assert found == min(MOST_BITS, max(0, math.ceil(gain))) or abs(gain - round(gain)) < 1e-9
    averaged = averaged_fisher(torch.tensor([fisher], dtype=torch.float64), prior, tasks)
    assert float(averaged) == pytest.approx(((tasks + 1) * prior + fisher) / (tasks + 2))


def test_bits_by_hand():
    # (F + 1) / 2 = 4**b
    fisher = torch.tensor([0.0, 1.0, 7.0, 31.0, 32.0, 2.0 * 4**30])
    assert information_bits(fisher, 1.0).tolist() == [0, 0, 1, 2, 3, MOST_BITS]
    assert radius(torch.tensor([0, 1, 3, MOST_BITS]), 8.0).tolist() == [math.inf, 4.0, 1.0, 0.0]


@given(st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=20), st.floats(0, 1))
def test_the_prior_is_a_quantile_of_what_is_not_zero(values, quantile):
    some = sorted(value for value in values if value > 0)
    fisher = torch.tensor(values)
    if some:
        assert fisher_prior(fisher, quantile) == some[round(quantile * (len(some) - 1))]
    else:
        with pytest.raises(ValueError, match="none of"):
            fisher_prior(fisher, quantile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_projected_numbers_are_within_their_radius_and_the_others_stay(dtype):
    generator = torch.Generator().manual_seed(0)
    start, moved = (torch.randn(500, 3, generator=generator).to(dtype) for _ in range(2))
    within = torch.rand(500, 3, generator=generator).double()
    within[:5], within[5:9] = 0.0, torch.inf
    found = moved.clone()
    project(found, start, within)
    change = (found.double() - start.double()).abs()
    assert (change <= within).all()
    free = (moved.double() - start.double()).abs() <= within
    assert torch.equal(found[free], moved[free])
    spacing = torch.finfo(dtype).eps * torch.maximum(found.double().abs(), start.double().abs())
    assert (change >= within - 2 * spacing)[~free].all(), "they are as near to the bound as the dtype has numbers"


def taught(model, region, steps=100):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        model(**tiny.inputs(tiny.batch(seed=step % 3))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if region:
            region.after_step()
    return model


def fisher_of(model):
    """Mean squared gradient over single sequences, by parameter."""
    batch, found = tiny.batch(seed=9), {}
    for row in range(4):
        model(**tiny.inputs(tiny.part(batch, row, row + 1))).loss.backward()
        for name, parameter in model.named_parameters():
            found[name] = found.get(name, 0) + parameter.grad**2 / 4
        model.zero_grad()
    return found


def test_after_a_hundred_steps_no_number_has_left_its_radius():
    model = tiny.decoder()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    bits = {name: information_bits(f, fisher_prior(f, 0.2)) for name, f in fisher_of(model).items()}
    region = TrustRegion(model, {name: radius(each, 0.1) for name, each in bits.items()})
    assert region.farthest() == 0
    taught(model, region)
    assert 0.99 < region.farthest() <= 1
    for name, parameter in model.named_parameters():
        within = radius(bits[name], 0.1)
        assert ((parameter.detach().double() - start[name].double()).abs() <= within).all()


def test_without_bits_nothing_is_held_and_with_the_most_nothing_moves():
    plain, free, frozen = (tiny.decoder() for _ in range(3))
    taught(plain, None, 10)
    names = dict(free.named_parameters())
    taught(free, TrustRegion(free, {n: radius(torch.zeros_like(p), 1.0) for n, p in names.items()}), 10)
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), free.parameters()))
    held = {n: radius(torch.full_like(p, MOST_BITS), 1.0) for n, p in frozen.named_parameters()}
    taught(frozen, TrustRegion(frozen, held), 10)
    assert all(torch.equal(one, other) for one, other in zip(tiny.decoder().parameters(), frozen.parameters()))


def test_rows_may_share_a_radius():
    model = tiny.memory_model()
    name = "model.memory.0.weight"
    fisher = torch.rand(64, 16)
    assert torch.equal(per_row(fisher)[:, 0], fisher.mean(1))
    within = torch.full((64, 1), 0.01).double()
    start = model.get_parameter(name).detach().clone()
    region = TrustRegion(model, {name: within})
    with torch.no_grad():
        model.get_parameter(name).add_(torch.linspace(-1, 1, 64)[:, None])
    region.after_step()
    assert (model.get_parameter(name).detach() - start).abs().max() <= 0.01


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: information_bits(torch.tensor([-1.0]), 1.0), "must be 0 or more"),
        (lambda: information_bits(torch.tensor([1.0]), 0.0), "the prior above 0"),
        (lambda: radius(torch.tensor([1]), 0.0), "bound is 0.0"),
        (lambda: fisher_prior(torch.ones(2), 1.5), "quantile is 1.5"),
        (lambda: TrustRegion(tiny.decoder(), {"head": torch.ones(1)}), "no parameter 'head'"),
        (lambda: TrustRegion(tiny.decoder(), {"model.norm.weight": torch.ones(3)}), r"is \(16,\), its radii \(3,\)"),
    ],
)
def test_what_gives_no_region_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

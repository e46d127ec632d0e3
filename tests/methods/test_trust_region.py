"""Bits against numbers worked out by hand; no number leaves its radius; the two ends are free and frozen."""

import math

import pytest
import tiny
import torch
from finetuning import finetuner_of
from hypothesis import given
from hypothesis import strategies as st

from memlayer.methods.trust_region import (
    MOST_BITS,
    TrustRegion,
    averaged_fisher,
    bounds,
    fisher_prior,
    information_bits,
    per_row,
    radii_of,
    radius,
    sampled_fisher,
)

BACKGROUND = torch.randint(4, tiny.VOCAB, (6, 9), generator=torch.Generator().manual_seed(9)).tolist()


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
def test_bounds_lie_within_the_radius_and_are_as_near_to_it_as_the_dtype_has_numbers(dtype):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(500, 3, generator=generator).to(dtype)
    within = torch.rand(500, 3, generator=generator)
    within[:5], within[5:9] = 0.0, torch.inf
    for end, sign in zip(bounds(start, within), (-1, 1)):
        assert end.dtype == dtype
        change = sign * (end.double() - start.double())
        assert (change <= within).all()
        assert torch.equal(end[:5], start[:5])
        spacing = torch.finfo(dtype).eps * torch.maximum(end.double().abs(), start.double().abs())
        assert (change >= within - 2 * spacing)[9:].all()


def taught(model, region, steps=100):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        model(**tiny.inputs(tiny.batch(seed=step % 3))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if region:
            region.after_step()
    return model


def holding(model, radii):
    region = TrustRegion(BACKGROUND)
    region.hold(model, radii)
    return region


def test_the_information_is_the_mean_squared_gradient_of_what_the_model_would_say():
    model = tiny.memory_model(mode="add")
    model.model.layers[1].mlp.memory.out.weight.data.normal_()
    found = sampled_fisher(model, BACKGROUND, seed=3)
    assert all(p.grad is None for p in model.parameters())
    generator, expected = torch.Generator().manual_seed(3), {}
    for ids in BACKGROUND:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn).backward()
        for name, parameter in model.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad**2 / len(BACKGROUND)
        model.zero_grad()
    for name, information in found.items():
        torch.testing.assert_close(information, expected[name], atol=1e-7, rtol=1e-4)  # float32
    model.model.memory[0].sparse = True
    torch.testing.assert_close(sampled_fisher(model, BACKGROUND, seed=3), found)


def test_after_a_hundred_steps_no_number_has_left_its_radius():
    model = tiny.decoder()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    region = TrustRegion(BACKGROUND, bound=0.5, quantile=0.2)
    region.begin(model)
    radii = radii_of(model, sampled_fisher(model, BACKGROUND), 0.5, 0.2)
    taught(model, region)
    reached = 0
    for name, parameter in model.named_parameters():
        moved = (parameter.detach().double() - start[name].double()).abs()
        assert (moved <= radii[name]).all()
        reached += int((moved > 0.999 * radii[name]).sum())
    assert reached > 100


def test_what_the_background_says_changes_less_than_without_the_region():
    """At the same loss on what is taught, and not because less of it was learned."""
    background = torch.tensor(BACKGROUND)
    losses = {}
    for held in (False, True):
        model = tiny.decoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(60):  # it knows the background
            model(input_ids=background, labels=background).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        region = TrustRegion(BACKGROUND, bound=0.3, quantile=0.5)
        region.begin(model)
        batch, optimizer = tiny.batch(seed=1), torch.optim.AdamW(model.parameters(), lr=0.003)
        for _ in range(200):
            loss = model(**tiny.inputs(batch)).loss
            if float(loss.detach()) < 1.0:
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if held:
                region.after_step()
        with torch.no_grad():
            losses[held] = float(model(input_ids=background, labels=background).loss)
        assert float(loss.detach()) < 1.0
    assert losses[True] < losses[False] - 0.1


def test_without_bits_nothing_is_held_and_with_the_most_nothing_moves():
    plain, free, frozen = (tiny.decoder() for _ in range(3))
    taught(plain, None, 10)
    names = dict(free.named_parameters())
    taught(free, holding(free, {n: radius(torch.zeros_like(p), 1.0) for n, p in names.items()}), 10)
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), free.parameters()))
    held = {n: radius(torch.full_like(p, MOST_BITS), 1.0) for n, p in frozen.named_parameters()}
    taught(frozen, holding(frozen, held), 10)
    assert all(torch.equal(one, other) for one, other in zip(tiny.decoder().parameters(), frozen.parameters()))


def test_rows_of_a_memory_share_a_radius_and_sparse_memory_finetuning_stays_within():
    model = tiny.memory_model(mode="add")
    model.model.layers[1].mlp.memory.out.weight.data.normal_()
    name = "model.memory.0.weight"
    fisher = sampled_fisher(model, BACKGROUND)
    assert torch.equal(per_row(fisher[name])[:, 0], fisher[name].mean(1))
    within = radii_of(model, fisher, 0.2)[name]
    assert within.shape == (64, 1)
    start = model.get_parameter(name).detach().clone()
    region = TrustRegion(BACKGROUND, bound=0.2)
    region.begin(model)
    finetuner = finetuner_of(model, num_rows=20)
    optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=5.0))
    for _ in range(10):
        finetuner.loss(tiny.batch(seed=1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        region.after_step(finetuner.parameters())
    patch = finetuner.detach()
    moved = (model.get_parameter(name).detach().double() - start.double()).abs()
    assert (moved <= within).all()
    assert (moved > 0.999 * within).any()
    patch.revert(model)
    assert torch.equal(model.get_parameter(name), start)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: information_bits(torch.tensor([-1.0]), 1.0), "must be 0 or more"),
        (lambda: information_bits(torch.tensor([1.0]), 0.0), "the prior above 0"),
        (lambda: radius(torch.tensor([1]), 0.0), "bound is 0.0"),
        (lambda: fisher_prior(torch.ones(2), 1.5), "quantile is 1.5"),
        (lambda: TrustRegion(BACKGROUND, bound=0.0), "bound=0.0"),
        (lambda: TrustRegion([]), "0 sequences"),
        (lambda: sampled_fisher(tiny.decoder(), []), "at least one sequence"),
        (lambda: holding(tiny.decoder(), {"head": torch.ones(1)}), "no parameter 'head'"),
        (lambda: holding(tiny.decoder(), {"model.norm.weight": torch.ones(3)}), r"is \(16,\), its radii \(3,\)"),
    ],
)
def test_what_gives_no_region_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

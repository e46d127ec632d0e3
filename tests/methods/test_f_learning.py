"""Forgetting is an exact arithmetic of weights: of all, of LoRA's, and of the rows of a memory patch."""

import warnings

import peft
import pytest
import tiny
import torch
from finetuning import learn

from memlayer.methods.f_learning import (
    add_delta,
    best_strength,
    delta_since,
    forget_then_learn,
    lora_delta,
    restore,
    snapshot,
)

OLD, NEW, OTHER = (tiny.batch(seed=seed) for seed in (1, 2, 3))
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)


def loss_of(model, batch):
    with torch.no_grad():
        return float(model(**tiny.inputs(batch)).loss)


def trained_on(batch, steps=10, rate=0.3):
    def train(model):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(steps):
            model(**tiny.inputs(batch)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def knowing_old():
    """A decoder that knows the old answers and something else."""
    model = tiny.decoder()
    for _ in range(6):
        trained_on(OLD)(model)
        trained_on(OTHER)(model)
    return model


def test_without_strength_it_is_plain_finetuning_to_the_bit():
    one, other = tiny.decoder(), tiny.decoder()
    forget_then_learn(one, trained_on(OLD), trained_on(NEW), strength=0.0)
    trained_on(NEW)(other)
    assert same(snapshot(one), snapshot(other))


def test_what_is_learned_starts_from_the_weights_less_the_old_answers():
    model, seen = tiny.decoder(), {}
    before = snapshot(model)
    delta = forget_then_learn(model, trained_on(OLD), lambda model: seen.update(snapshot(model)), strength=0.5)
    other = tiny.decoder()
    trained_on(OLD)(other)
    for name, tensor in before.items():
        moved = dict(other.named_parameters())[name].detach() - tensor
        assert torch.equal(delta[name], moved)
        assert torch.equal(seen[name], tensor - 0.5 * moved)


def test_the_stronger_the_less_likely_the_old_answer_and_too_strong_harms_the_rest():
    model = knowing_old()
    before, others_before = snapshot(model), loss_of(model, OTHER)
    trained_on(OLD, steps=5)(model)
    delta = delta_since(model, before)
    old, others = [], []
    for strength in STRENGTHS:
        restore(model, before)
        add_delta(model, delta, -strength)
        old.append(loss_of(model, OLD))
        others.append(loss_of(model, OTHER))
    assert old == sorted(old)
    assert old[-1] > old[0] + 0.1
    restore(model, before)
    add_delta(model, delta, -30.0)
    assert loss_of(model, OTHER) > others_before + 1


def test_adding_and_taking_away_restores_and_a_snapshot_restores_to_the_bit():
    model = tiny.decoder()
    before = snapshot(model)
    trained_on(OLD)(model)
    delta = delta_since(model, before)
    restore(model, before)
    assert same(snapshot(model), before)
    add_delta(model, delta, -0.7)
    add_delta(model, delta, 0.7)
    for name, tensor in snapshot(model).items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=0)  # float32


def test_what_has_not_moved_is_no_part_of_the_change():
    model = tiny.memory_model()
    before = snapshot(model)
    learn(model, [OLD])[0].detach()
    assert list(delta_since(model, before)) == ["model.memory.0.weight"]


def test_a_lora_change_is_the_difference_that_merging_makes():
    model = tiny.decoder()
    before = snapshot(model)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    delta = lora_delta(wrapped)
    merged = wrapped.merge_and_unload()
    assert set(delta) == set(delta_since(merged, before))
    for name, moved in delta_since(merged, before).items():
        torch.testing.assert_close(delta[name], moved, atol=1e-6, rtol=0)  # float32
    add_delta(merged, delta, -1.0)
    for name, tensor in snapshot(merged).items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="no LoRA layers"):
        lora_delta(wrapped, "other")


def test_the_strength_that_learned_most_is_taken_where_the_rest_is_kept():
    tried = {0.0: (0.5, 0.9), 0.5: (0.7, 0.9), 1.0: (0.7, 0.89), 2.0: (0.9, 0.5)}
    assert best_strength(tried, 0.9) == 0.5
    assert best_strength(tried, 0.9, max_drop=0.5) == 2.0
    with pytest.raises(ValueError, match=r"of 4 strengths none keeps 0\.93, the best keeps 0.9"):
        best_strength(tried, 0.95)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: forget_then_learn(tiny.decoder(), trained_on(OLD), trained_on(NEW), -1.0), "strength is -1.0"),
        (lambda: add_delta(tiny.decoder(), {"head": torch.zeros(1)}, 1.0), "no parameter 'head'"),
        (lambda: restore(tiny.decoder(), {"model.norm.weight": torch.zeros(1)}), r"is \(16,\) in the model, \(1,\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

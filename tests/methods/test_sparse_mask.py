"""Which numbers are chosen: exactly the share asked for, by the score asked for, of the matrices that are meant."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.methods.sparse_mask import (
    answer_loss,
    choose,
    linear_weights,
    random_share,
    squared_gradients,
    top_share,
)

LESSONS = [tiny.batch(seed=seed) for seed in range(3)]


def test_matrices_of_linear_layers_are_chosen_from_and_nothing_else():
    names = set(linear_weights(tiny.memory_model(mode="add")))
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "model.layers.1.mlp.memory.gate.weight" in names
    assert not [name for name in names if "embed" in name or "norm" in name or "lm_head" in name or "keys" in name]
    assert "model.memory.0.weight" not in names


@pytest.mark.parametrize("tied", [True, False])
def test_kinds_of_modules_decide_and_not_their_names(tied):
    """GPT-2's matrices are Conv1D, its mlp.c_fc.weight looks like a head, and ln_1.weight does not say norm."""
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=tied)
    names = set(linear_weights(GPT2LMHeadModel(config)))
    inner = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"transformer.h.0.{name}.weight" for name in inner}


def test_a_tied_matrix_is_counted_once():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    assert list(linear_weights(model)) == ["0.weight"]
    model.append(nn.Embedding(3, 3))
    model[2].weight = model[0].weight
    assert not linear_weights(model)


scores = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=60)


@settings(deadline=None)
@given(scores, st.floats(0.01, 1.0))
def test_the_top_share_is_exact_and_never_below_what_is_left_out(values, density):
    score = torch.tensor(values)
    chosen = top_share({"a": score}, density)["a"]
    above_zero = sum(value > 0 for value in values)
    assert chosen.dtype == torch.int32
    assert len(chosen) == min(round(density * len(values)), above_zero)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    left = torch.ones(len(values), dtype=torch.bool)
    left[chosen] = False
    if len(chosen):
        assert score[chosen].min() > 0
        assert not left.any() or score[chosen].min() >= score[left].max()


def test_where_every_score_is_zero_nothing_is_chosen():
    assert len(top_share({"a": torch.zeros(10)}, 0.5)["a"]) == 0


def test_a_tensor_of_more_than_16_million_numbers_can_be_chosen_from():
    """torch.quantile, which the paper's code uses, refuses more than 2**24."""
    score = torch.zeros(2**24 + 7)
    score[[3, 2**24 + 1, 2**24 + 5]] = torch.tensor([1.0, 3.0, 2.0])
    assert top_share({"a": score}, 2.1 / len(score))["a"].tolist() == [2**24 + 1, 2**24 + 5]


@settings(deadline=None)
@given(st.integers(1, 200), st.floats(0.01, 1.0), st.integers(0, 2**60))
def test_a_random_share_is_exact_and_drawn_by_its_seed(size, density, seed):
    tensor = {"a": torch.zeros(size)}
    chosen = random_share(tensor, density, seed)["a"]
    assert len(chosen) == round(density * size)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert torch.equal(chosen, random_share(tensor, density, seed)["a"])


def test_random_choices_of_different_seeds_overlap_as_chance_has_it():
    tensor = {"a": torch.zeros(100_000)}
    one, other = (set(random_share(tensor, 0.1, seed)["a"].tolist()) for seed in (0, 1))
    assert 800 < len(one & other) < 1200


def test_gradients_are_squared_batch_by_batch_as_autograd_has_them():
    model = tiny.memory_model()
    parameters = linear_weights(model)
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in LESSONS:
        gradients = torch.autograd.grad(answer_loss(model, batch), parameters.values())
        for name, gradient in zip(parameters, gradients, strict=True):
            expected[name] += gradient.detach() ** 2 / len(LESSONS)
    model.model.norm.weight.requires_grad_(False)
    name, weight = next(iter(parameters.items()))
    weight.grad = torch.ones_like(weight)
    before, required = state_fingerprint(model), [p.requires_grad for p in model.parameters()]
    found = squared_gradients(model, parameters, (answer_loss(model, batch) for batch in LESSONS))
    for each in parameters:
        torch.testing.assert_close(found[each], expected[each], rtol=1e-5, atol=1e-10)  # float32
    assert state_fingerprint(model) == before
    assert [p.requires_grad for p in model.parameters()] == required
    assert torch.equal(model.get_parameter(name).grad, torch.ones_like(weight))
    assert all(p.grad is None for p in model.parameters() if p is not weight)


def test_activation_checkpointing_changes_no_score():
    plain, checkpointed = tiny.decoder(), tiny.decoder()
    tiny.checkpoint_activations(checkpointed)
    scores = [
        squared_gradients(model, linear_weights(model), (answer_loss(model, batch) for batch in LESSONS))
        for model in (plain, checkpointed)
    ]
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


@pytest.mark.parametrize("score", ["random", "magnitude", "fisher"])
def test_every_score_chooses_its_share_and_a_different_one(score):
    model = tiny.decoder()
    chosen = choose(model, score, 0.1, 0, LESSONS)
    parameters = linear_weights(model)
    assert {name: len(index_C) for name, index_C in chosen.items()} == {
        name: round(0.1 * p.numel()) for name, p in parameters.items()
    }
    if score == "magnitude":
        for name, p in parameters.items():
            absolute = p.detach().abs().flatten()
            assert absolute[chosen[name]].min() >= absolute.sort().values[-len(chosen[name])]
    others = {"random", "magnitude", "fisher"} - {score}
    for other in others:
        theirs = choose(model, other, 0.1, 0, LESSONS)
        assert any(not torch.equal(chosen[name], theirs[name]) for name in chosen)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda m: choose(m, "best", 0.1, 0), "score is 'best', must be one of"),
        (lambda m: choose(m, "random", 0.0, 0), "density is 0.0, must be above 0 and at most 1"),
        (lambda m: choose(m, "magnitude", 1.5, 0), "density is 1.5"),
        (lambda m: choose(m, "fisher", 0.1, 0, []), "there is no batch to score"),
        (lambda m: choose(m, "infonce", 0.1, 0, LESSONS[:1]), "1 of them is too few"),
        (lambda m: choose(nn.Embedding(2, 2), "random", 0.1, 0), "Embedding has no linear layer"),
        (lambda m: top_share({"w": torch.tensor([float("nan")])}, 0.5), "scores of w are negative or nan"),
        (lambda m: squared_gradients(m, linear_weights(m), [torch.tensor(float("inf"))]), "the loss of batch 0 is inf"),
    ],
)
def test_what_cannot_be_chosen_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make(tiny.decoder())

"""MIST moves what it may move and goes off again; the released code moves what its description says."""

from itertools import pairwise

import pytest
import tiny
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.methods.infonce import lesson_losses, projection, supervised_infonce
from memlayer.methods.mist import ReleasedMist, adapt, adapt_to_lessons, tune
from memlayer.methods.sparse_mask import linear_weights

LESSONS = [tiny.batch(seed=seed) for seed in range(3)]
SETTINGS = {"density": 0.05, "drop": 0.9, "epochs": 6, "lr": 0.3}


def loss_of(model, head):
    with torch.no_grad():
        (loss,) = lesson_losses(model, head, LESSONS)
    return float(loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lessons_are_told_apart_better_by_a_twentieth_of_each_matrix_and_it_goes_off_to_the_last_bit(dtype):
    model = tiny.decoder().to(dtype)
    head = projection(tiny.WIDTH, seed=0)
    before, state = loss_of(model, head), state_fingerprint(model)
    start = tiny.snapshot(model)
    kept = nn.Linear(tiny.WIDTH, 128)
    kept.load_state_dict(head.state_dict())
    delta = adapt(model, head, lambda: lesson_losses(model, head, LESSONS), **SETTINGS)
    assert loss_of(model, kept) < before - 0.01, "not by the head alone"
    assert not torch.equal(head.weight, kept.weight)
    eligible = linear_weights(model)
    for name, tensor in model.state_dict().items():
        moved = int((tensor != start[name]).sum())
        assert moved <= (round(0.05 * tensor.numel()) if name in eligible else 0), name
    assert delta.num_numbers > 0.01 * sum(p.numel() for p in eligible.values())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    delta.revert(model)
    assert state_fingerprint(model) == state


def test_all_numbers_without_dropout_are_tuned_as_by_plain_sgd():
    ours, theirs = tiny.decoder(), tiny.decoder()
    heads = [projection(tiny.WIDTH, seed=0) for _ in range(2)]
    everything = {name: torch.arange(p.numel(), dtype=torch.int32) for name, p in linear_weights(ours).items()}
    tune(ours, everything, heads[0], lambda: lesson_losses(ours, heads[0], LESSONS), epochs=4, lr=0.05, drop=0.0)

    groups = [{"params": linear_weights(theirs).values()}, {"params": heads[1].parameters(), "lr": 0.01}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    for _ in range(4):
        (loss,) = lesson_losses(theirs, heads[1], LESSONS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-4, atol=1e-5)  # float32
    torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paper_code", [False, True])
def test_a_run_is_repeated_by_its_seed(paper_code):
    states = []
    for seed in (0, 0, 1):
        model = tiny.decoder()
        adapt_to_lessons(model, LESSONS, seed, paper_code, epochs=2, lr=0.1)
        states.append(state_fingerprint(model))
    assert states[0] == states[1] != states[2]
    assert states[0] != state_fingerprint(tiny.decoder())


@pytest.mark.parametrize("paper_code", [False, True])
def test_a_rate_at_which_the_loss_is_no_number_is_refused_and_nothing_has_changed(paper_code):
    model = tiny.decoder()
    before = state_fingerprint(model)
    with pytest.raises(ValueError, match=r"the loss is nan in epoch \d+ of MIST: a rate of 1e\+38 may be too high"):
        adapt_to_lessons(model, LESSONS, 0, paper_code, epochs=5, lr=1e38, momentum=0.0, drop=0.0)
    assert state_fingerprint(model) == before
    assert all(p.requires_grad for p in model.parameters())


class Encoder(nn.Module):
    """Two layers whose gradients a test can write out; ``norm`` is dense by its name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 16, bias=False)

    def forward(self, x):
        return self.last(self.norm(self.first(x).relu()))


X, Y = torch.randn(12, 20, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


def released(steps_seen=None, **settings):
    """The encoder after the released code's tuning on X and Y, one loss a pass, and the delta."""
    model, head = Encoder(), nn.Linear(16, 8)
    code = ReleasedMist(**{"epochs": 1, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "drop": 0.0} | settings)

    def losses():
        if steps_seen is not None:
            steps_seen.append(tiny.snapshot(model))
        yield supervised_infonce(head(model(X)), Y)

    return model, code.adapt(model, head, losses)


def gradients_of(model, head):
    loss = supervised_infonce(head(model(X)), Y)
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def test_released_a_tenth_of_a_matrix_moves_by_its_gradient_and_all_of_every_bias_and_norm():
    model, delta = released()
    torch.manual_seed(0)
    start = Encoder()
    head = nn.Linear(16, 8)  # drawn after the encoder, as in released()
    gradients = gradients_of(start, head)
    for name, p in model.named_parameters():
        gradient = gradients[name]
        chosen = gradient.square() >= gradient.square().flatten().quantile(0.9)
        if "bias" in name or "norm" in name:
            chosen = torch.ones_like(chosen)
        expected = start.get_parameter(name) - 0.1 * gradient * chosen
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)  # float32
    delta.revert(model)
    assert state_fingerprint(model) == state_fingerprint(start)


def test_released_weight_decay_moves_everything_and_momentum_what_was_dropped():
    """Of the chosen numbers 10, 47 and 89 % move in step 1, 6 and 21, and with weight decay every number in each."""
    seen = []
    released(seen, epochs=22, momentum=0.9, drop=0.9, lr=1e-3)
    name = "first.weight"
    moved = [(b[name] != a[name]).sum().item() for a, b in pairwise(seen[1:])]
    chosen = round(0.1 * 600)
    assert [moved[step - 1] / chosen for step in (1, 6, 21)] == pytest.approx([0.1, 0.47, 0.89], abs=0.13)
    seen = []
    released(seen, epochs=2, weight_decay=0.1, drop=0.9, lr=0.1)
    assert (seen[2][name] != seen[1][name]).float().mean() > 0.99


def test_released_later_tasks_move_what_was_taken_before_less_and_what_was_frozen_not_at_all():
    model, head, name = Encoder(), nn.Linear(16, 8), "first.weight"
    code = ReleasedMist(epochs=1, lr=0.1, momentum=0.0, weight_decay=0.0, drop=0.0, freeze_top=0.01)

    def losses():
        yield supervised_infonce(head(model(X)), Y)

    code.adapt(model, head, losses)
    frozen, earlier, before = code.frozen[name].clone(), code.taken[name].clone(), model.first.weight.detach().clone()
    gradient = gradients_of(model, head)[name]
    code.adapt(model, head, losses)
    change, taken = model.first.weight.detach() - before, code.taken[name] > earlier
    again, anew = taken & (earlier == 1) & ~frozen, taken & (earlier == 0)
    assert min(frozen.sum(), again.sum(), anew.sum()) > 0
    assert not change[frozen].any()
    torch.testing.assert_close(change[again], -0.1 * 0.9 * gradient[again], rtol=1e-4, atol=1e-7)  # float32
    torch.testing.assert_close(change[anew], -0.1 * gradient[anew], rtol=1e-4, atol=1e-7)
    assert int(code.frozen[name].sum()) > int(frozen.sum())


def test_released_a_tensor_whose_scores_are_mostly_zero_is_taken_whole():
    model, head, code = tiny.decoder(), projection(tiny.WIDTH, seed=0), ReleasedMist(epochs=0)
    code.adapt(model, head, lambda: lesson_losses(model, head, LESSONS))
    assert bool((code.taken["model.layers.0.mlp.up_proj.weight"] == 0).any())
    few = [tiny.batch(lengths=(4, 4)) for _ in range(2)]
    few[0]["input_ids"][:, :2] = torch.tensor([[5, 6], [5, 7]])
    few[1]["input_ids"][:, :2] = torch.tensor([[7, 6], [7, 5]])
    code = ReleasedMist(epochs=0)
    code.adapt(model, head, lambda: lesson_losses(model, head, few))
    assert bool((code.taken["model.embed_tokens.weight"] == 1).all()), "3 of 50 tokens are read before an answer"


def test_released_names_decide():
    """GPT-2's mlp.c_fc.weight holds fc.weight, and its ln_1.weight does not hold norm."""
    config = GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model, head, code = GPT2LMHeadModel(config), projection(16, seed=0), ReleasedMist(epochs=0)
    code.adapt(model, head, lambda: lesson_losses(model, head, LESSONS))
    assert "transformer.h.0.mlp.c_fc.weight" not in code.taken
    assert "transformer.h.0.ln_1.weight" in code.taken


def test_released_a_tensor_too_large_for_quantile_is_refused():
    model = nn.Linear(2**12, 2**12 + 1, bias=False)
    with pytest.raises(ValueError, match="weight has 16781312 numbers, and the released code chooses by"):
        ReleasedMist().adapt(model, nn.Linear(1, 1), list)

"""Chosen numbers step as under torch's own optimizers, and nothing else moves."""

import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.methods.sparse_mask import linear_weights, random_share
from memlayer.methods.sparse_optimizer import SparseOptimizer

RULES = {
    "sgd": ({"rule": "sgd"}, lambda p: torch.optim.SGD(p, lr=0.05)),
    "momentum": (
        {"rule": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    ),
    "adam": ({"rule": "adam", "weight_decay": 0.1}, lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1)),
    "adamw": ({"rule": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
}


def chosen(model, density=0.2):
    return random_share(linear_weights(model), density, seed=0)


def masks_of(model, indices):
    """Of each parameter a bool tensor that is True where a number is chosen."""
    masks = {name: torch.zeros(p.numel(), dtype=torch.bool) for name, p in model.named_parameters()}
    for name, index_C in indices.items():
        masks[name][index_C] = True
    return {name: masks[name].view(p.shape) for name, p in model.named_parameters()}


def train(model, optimizer, seeds=range(4)):
    for seed in seeds:
        model(**tiny.inputs(tiny.batch(seed=seed))).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("rule", RULES)
def test_chosen_numbers_step_as_with_torch_and_masked_gradients(rule):
    settings, dense = RULES[rule]
    ours, theirs = tiny.decoder(), tiny.decoder()
    indices = chosen(ours)
    train(ours, SparseOptimizer(ours, indices, lr=0.05, **settings))

    masks, optimizer = masks_of(theirs, indices), dense(theirs.parameters())
    for seed in range(4):
        before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
        theirs(**tiny.inputs(tiny.batch(seed=seed))).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                p.copy_(p.where(masks[name], before[name]))
        optimizer.zero_grad()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_numbers_that_are_not_chosen_keep_their_bits_and_chosen_ones_move(rule, drop):
    model = tiny.decoder()
    before, indices = tiny.snapshot(model), chosen(model)
    train(model, SparseOptimizer(model, indices, lr=0.05, drop=drop, **RULES[rule][0]), range(12))
    for name, mask in masks_of(model, indices).items():
        moved = model.get_parameter(name) != before[name]
        assert not moved[~mask].any()
        assert moved[mask].float().mean() > 0.9 or not mask.any()


@pytest.mark.parametrize("rule", RULES)
def test_a_step_moves_exactly_the_numbers_that_were_not_dropped(rule):
    """Momentum and decay of a dropped number wait, too: each step moves the share that is kept, not more and more."""
    model = tiny.decoder()
    optimizer = SparseOptimizer(model, chosen(model), lr=0.05, drop=0.9, seed=5, **RULES[rule][0])
    draws = torch.Generator().manual_seed(5)
    shares = []
    for seed in range(30):
        before = tiny.snapshot(model)
        train(model, optimizer, [seed])
        moved = 0
        for name, index_C in optimizer.indices.items():
            kept_C = torch.rand(len(index_C), generator=draws) >= 0.9
            moved_C = (model.get_parameter(name) != before[name]).view(-1)[index_C]
            assert not moved_C[~kept_C].any(), name
            moved += int(moved_C.sum())
        shares.append(moved / optimizer.num_chosen)
    assert max(shares) < 0.15, "about a tenth in the first step and in the last"
    assert min(shares) > 0.05


def test_a_number_that_was_dropped_steps_as_if_that_step_had_not_been():
    """Adam's count is the number's own, so its first step is as long as anybody's first."""
    weight = torch.nn.Linear(64, 64, bias=False)
    index = {"weight": torch.arange(64 * 64, dtype=torch.int32)}
    optimizer = SparseOptimizer(weight, index, lr=0.1, rule="adam", drop=0.5)
    start, x = weight.weight.detach().clone(), torch.ones(1, 64)
    steps_taken = torch.zeros(64, 64)
    for _ in range(3):
        before = weight.weight.detach().clone()
        weight(x).sum().backward()
        optimizer.step()
        steps_taken += weight.weight != before
    assert set(steps_taken.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    torch.testing.assert_close(weight.weight, start - 0.1 * steps_taken, rtol=0, atol=1e-5)  # each gradient is 1


def test_micro_batches_add_up():
    whole, parts = tiny.decoder(), tiny.decoder()
    indices = chosen(whole)
    batches = [tiny.batch(seed=seed) for seed in range(3)]
    one = SparseOptimizer(whole, indices, lr=0.1)
    sum(whole(**tiny.inputs(batch)).loss for batch in batches).backward()
    one.step()
    other = SparseOptimizer(parts, indices, lr=0.1)
    for batch in batches:
        parts(**tiny.inputs(batch)).loss.backward()
    other.step()
    for name, p in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name), p, rtol=1e-5, atol=1e-6)  # float32


def test_no_dense_gradient_is_kept_and_only_what_is_chosen_has_a_gradient():
    model = tiny.decoder()
    optimizer = SparseOptimizer(model, chosen(model), lr=0.1)
    model(**tiny.inputs(tiny.batch())).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    assert sum(map(len, gradients)) == optimizer.num_chosen
    for p in optimizer.param_groups[0]["params"]:
        assert all(column.numel() == p.numel() for column in optimizer.state[p].values())
    before = [g.clone() for g in gradients]
    norm = clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-3)
    assert norm > 1e-3
    assert all(torch.all(g.abs() <= b.abs()) for g, b in zip(gradients, before, strict=True))
    optimizer.zero_grad()
    state = state_fingerprint(model)
    optimizer.step()
    assert state_fingerprint(model) == state, "nothing moves without a gradient"


def test_steps_below_the_spacing_of_bfloat16_add_up():
    model = tiny.decoder().bfloat16()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SparseOptimizer(model, chosen(model), lr=1e-4, rule="adam")
    moved = []
    for _ in range(60):
        train(model, optimizer, [0])
        moved.append(sum(int((p != start[name]).sum()) for name, p in model.named_parameters()))
    assert moved[0] < 0.2 * optimizer.num_chosen, "one step is too small for most numbers"
    assert moved[-1] > 0.5 * optimizer.num_chosen, moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_put_into_the_weights_between_steps_is_gone_on_from(dtype):
    """A bound on the weights holds at every step, and the numbers do not run ahead of it; what was moved itself too."""
    model = nn.Linear(8, 8, bias=False).to(dtype)
    start, x = model.weight.detach().clone(), torch.ones(1, 8, dtype=dtype)
    optimizer = SparseOptimizer(model, {"weight": torch.arange(64, dtype=torch.int32)}, lr=0.1)
    for _ in range(5):
        model(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            model.weight.copy_(start + (model.weight - start).clamp(-0.15, 0.15))
    bound = model.weight.detach().clone()
    (-model(x).sum()).backward()
    optimizer.step()
    torch.testing.assert_close(model.weight, bound + 0.1, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-3)
    (numbers,) = optimizer.param_groups[0]["params"]
    with torch.no_grad():
        numbers.fill_(2.0)
    optimizer.write()
    assert torch.equal(model.weight, torch.full_like(start, 2.0))


def test_activation_checkpointing_changes_nothing():
    plain, checkpointed = tiny.decoder(), tiny.decoder()
    tiny.checkpoint_activations(checkpointed)
    for model in (plain, checkpointed):
        train(model, SparseOptimizer(model, chosen(model), lr=0.1))
    assert state_fingerprint(checkpointed) == state_fingerprint(plain)


def test_detaching_gives_an_ordinary_model_and_the_delta_back():
    model = tiny.decoder()
    model.model.norm.weight.requires_grad_(False)
    before, required = state_fingerprint(model), [p.requires_grad for p in model.parameters()]
    optimizer = SparseOptimizer(model, chosen(model), lr=0.1)
    train(model, optimizer)
    after, delta = state_fingerprint(model), optimizer.detach()
    assert [p.requires_grad for p in model.parameters()] == required
    model(**tiny.inputs(tiny.batch())).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    delta.revert(model)
    assert state_fingerprint(model) == before != after
    delta.apply(model)
    assert state_fingerprint(model) == after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_goes_on_from_its_state_ends_with_the_same_bits(tmp_path, rule, dtype):
    whole, resumed = tiny.decoder().to(dtype), tiny.decoder().to(dtype)
    settings = {"lr": 0.02, "drop": 0.3, **RULES[rule][0]}
    optimizer = SparseOptimizer(whole, chosen(whole), **settings)
    train(whole, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    train(whole, optimizer, range(3, 6))

    goes_on = SparseOptimizer(resumed, chosen(resumed), **settings)
    goes_on.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed, goes_on, range(3, 6))
    assert state_fingerprint(resumed) == state_fingerprint(whole)
    goes_on.detach().revert(resumed)
    assert state_fingerprint(resumed) == state_fingerprint(tiny.decoder().to(dtype))


def test_a_state_of_other_numbers_or_another_model_is_refused_and_changes_nothing():
    model = tiny.decoder()
    optimizer = SparseOptimizer(model, chosen(model), lr=0.1)
    train(model, optimizer)
    state = optimizer.state_dict()
    first = next(iter(linear_weights(model)))
    for other, indices, named in (
        (tiny.decoder(), random_share(linear_weights(model), 0.2, seed=1), f"moves other numbers of {first}"),
        (tiny.decoder(seed=1), chosen(model), f"of a model in which {first} held other numbers"),
        (tiny.decoder(), {first: chosen(model)[first]}, "moves numbers of other tensors"),
    ):
        before = state_fingerprint(other)
        with pytest.raises(ValueError, match=named):
            SparseOptimizer(other, indices, lr=0.1).load_state_dict(state)
        assert state_fingerprint(other) == before
    plain = torch.optim.SGD(tiny.decoder().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="it lacks draws, indices, names, numbers, originals"):
        optimizer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": -1}, "lr is -1, must be at least 0"),
        ({"lr": 1, "rule": "lion"}, "rule is 'lion', must be"),
        ({"lr": 1, "drop": 1.0}, "drop is 1.0, must be at least 0 and below 1"),
        ({"lr": 1, "momentum": float("nan")}, "momentum is nan"),
        ({"lr": 1, "betas": (0.9, 1)}, r"betas are \(0.9, 1\), must lie between"),
        ({"lr": 1, "indices": {}}, "no number is chosen"),
        ({"lr": 1, "indices": {"bias": [0]}}, "numbers of bias are chosen, which the model does not have"),
        ({"lr": 1, "indices": {"weight": [0, 4]}}, "not ascending, or outside its 4 numbers"),
        ({"lr": 1, "indices": {"weight": [1, 1]}}, "not ascending"),
        ({"lr": 1, "indices": {"weight": [-1, 1]}}, "not ascending"),
    ],
)
def test_what_cannot_be_is_refused_and_freezes_nothing(settings, named):
    model = torch.nn.Linear(2, 2, bias=False)
    given = settings.pop("indices", {"weight": [0]})
    indices = {name: torch.tensor(places, dtype=torch.int32) for name, places in given.items()}
    with pytest.raises(ValueError, match=named):
        SparseOptimizer(model, indices, **settings)
    assert model.weight.requires_grad


def test_places_in_int64_are_refused():
    with pytest.raises(ValueError, match="they must fit int32"):
        SparseOptimizer(torch.nn.Linear(2, 2), {"weight": torch.tensor([0])}, lr=1)

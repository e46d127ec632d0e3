"""Fixed weights are plain replay, the meta-gradient is that of finite differences, and noise is weighted down."""

from copy import deepcopy

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from memlayer.methods.replay_weights import (
    ReplayWeights,
    losses_and_sizes,
    meta_gradient,
    meta_step,
    pair_losses,
    weighted_loss,
)

TABLE = "model.memory.0.weight"
NEW, OLD = tiny.batch((9, 7, 8, 9), seed=1), tiny.batch((7, 9, 9, 8), seed=2)


def test_losses_and_sizes_are_those_of_each_sequence_alone():
    model = tiny.decoder()
    with torch.no_grad():
        found = losses_and_sizes(model(**tiny.inputs(NEW)).logits, NEW["labels"])
        for row in range(4):
            alone = tiny.part(NEW, row, row + 1)
            length = int(alone["attention_mask"].sum())
            ids = alone["input_ids"][:, :length]
            out = model(input_ids=ids, labels=ids)
            torch.testing.assert_close(found[0][row], out.loss)
            torch.testing.assert_close(found[1][row], out.logits[0, : length - 1].norm(dim=-1).mean())


@given(st.floats(0, 3), st.integers(0, 99))
def test_with_weights_one_and_beta_it_is_plain_replay(beta, seed):
    losses = torch.rand(5, 2, generator=torch.Generator().manual_seed(seed))
    fixed = torch.tensor([1.0, beta]).expand(5, 2)
    torch.testing.assert_close(weighted_loss(losses, fixed), losses[:, 0].mean() + beta * losses[:, 1].mean())


def test_the_net_sees_numbers_and_gives_weights_between_zero_and_one():
    torch.manual_seed(0)
    net, model = ReplayWeights(), tiny.decoder()
    losses, sizes = pair_losses(model, NEW, OLD)
    weights = net(losses, sizes)
    assert weights.shape == (4, 2)
    assert ((weights > 0) & (weights < 1)).all()
    weights.sum().backward()
    assert all(p.grad is None for p in model.parameters()), "weights are no part of the model's loss"
    expected = F.relu(losses @ net.of_losses.weight.T + net.of_losses.bias)
    expected = expected + F.relu(sizes @ net.of_sizes.weight.T + net.of_sizes.bias)
    torch.testing.assert_close(weights, torch.sigmoid(expected @ net.to_weights.weight.T + net.to_weights.bias))


def model_with_memory():
    model = tiny.memory_model(mode="add")
    model.model.layers[1].mlp.memory.out.weight.data.normal_()
    return model


def stepped(model, weights, rate, names):
    """The replayed loss after a step of the weighted loss, taken for real in a copy of the model."""
    model = deepcopy(model)
    losses, _ = pair_losses(model, NEW, OLD)
    weighted_loss(losses, weights).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in (names or name):
                parameter -= rate * parameter.grad
        return float(losses_and_sizes(model(**tiny.inputs(OLD)).logits, OLD["labels"])[0].double().mean())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("names", [None, ("model.norm.weight", "model.layers.2.mlp.down_proj.weight"), (TABLE,)])
def test_the_gradient_is_that_of_finite_differences_for_a_memorys_rows_too(names, sparse):
    model, rate = model_with_memory(), 0.05 if names is None else 0.5  # small enough that its reads stay the same
    model.model.memory[0].sparse = sparse
    weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
    before = tiny.snapshot(model)
    loss, gradient = meta_gradient(model, weights, NEW, OLD, rate, names)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model.model.memory[0].sparse = False
    assert float(loss) == pytest.approx(stepped(model, weights, rate, names), abs=1e-5)  # float32
    for row in range(4):
        for column in range(2):
            nudge = torch.zeros(4, 2)
            nudge[row, column] = 0.01
            ends = [stepped(model, weights + sign * nudge, rate, names) for sign in (1, -1)]
            assert float(gradient[row, column]) == pytest.approx((ends[0] - ends[1]) / 0.02, abs=5e-5, rel=0.05)
    assert gradient.abs().max() > 1e-3


def test_steps_of_the_net_lower_the_loss_on_what_is_replayed():
    torch.manual_seed(0)
    model, net = tiny.decoder(), ReplayWeights()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    found = [meta_step(model, net, optimizer, NEW, OLD, 0.3) for _ in range(12)]
    assert found[-1] < found[0] - 0.01
    losses, sizes = pair_losses(model, NEW, OLD)
    new, old = net(losses, sizes).mean(0)
    assert old > new, "what is replayed is what the net is trained on"


def counting(starts, noisy=0):
    """Sequences that count upwards; of the first ones the labels are noise."""
    ids = 4 + (torch.tensor(list(starts))[:, None] + torch.arange(8)) % (tiny.VOCAB - 4)
    noise = torch.randint(4, tiny.VOCAB, (noisy, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.cat([noise, ids[noisy:]])}


def test_new_examples_with_noisy_labels_come_to_count_less():
    model = tiny.decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(25):
        model(**counting(range(0, 46, 2))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    new, old = counting(range(1, 44, 6), noisy=3), counting(range(0, 43, 6))
    torch.manual_seed(1)
    net = ReplayWeights()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.005)

    def weight_of_noise():
        with torch.no_grad():
            weights = net(*pair_losses(model, new, old))[:, 0]
        return float(weights[:3].mean() / weights[3:].mean()), bool(weights[:3].max() < weights[3:].min())

    assert weight_of_noise()[0] > 0.95, "at first they count alike"
    for _ in range(8):
        meta_step(model, net, optimizer, new, old, 0.1)
    share, apart = weight_of_noise()
    assert share < 0.8
    assert apart


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, net: pair_losses(model, NEW, tiny.part(OLD, 0, 2)), "4 new examples and 2 replayed"),
        (lambda model, net: meta_step(model, net, None, NEW, OLD, 0.1, ("head",)), "no trainable parameter 'head'"),
        (
            lambda model, net: pair_losses(model, NEW | {"labels": torch.full_like(NEW["labels"], -100)}, OLD),
            "4 of 4 sequences have no token",
        ),
    ],
)
def test_what_makes_no_pairs_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny.decoder(), ReplayWeights())

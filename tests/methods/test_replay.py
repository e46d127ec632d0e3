"""Replay: what is drawn, what its loss is, and with every method."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from memlayer.methods.replay import Replay, kl_of_kept


def examples(number=12, length=7):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tiny.PAD + 1, tiny.VOCAB, (number, length), generator=generator).tolist()
    lengths = [length - index % 3 for index in range(number)]
    return [
        {"input_ids": each[:there], "answer_start": 3, "length": there}
        for each, there in zip(ids, lengths, strict=True)
    ]


def loss_of(replay, model, step=0):
    replay.step = step
    return replay.loss(model, {}, torch.empty(0))


def test_the_text_target_is_the_models_own_loss_on_the_drawn_examples():
    model, told = tiny.decoder(), examples(4)
    replay = Replay(told, tiny.PAD, batch_size=4, weight=0.5)
    nats = []
    for example in told:
        ids_1L = torch.tensor([example["input_ids"]])
        logp_LC = F.log_softmax(model(ids_1L).logits[0, :-1], dim=-1)
        nats += (-logp_LC.gather(-1, ids_1L[0, 1:, None])[:, 0]).tolist()
    torch.testing.assert_close(loss_of(replay, model), 0.5 * torch.tensor(sum(nats) / len(nats)))


def test_the_base_target_is_nothing_at_first_and_grows_when_the_model_moves():
    model = tiny.decoder()
    for kept in (5, tiny.VOCAB):
        replay = Replay(examples(), tiny.PAD, batch_size=3, target="base", num_kept=kept)
        replay.begin(model)
        assert loss_of(replay, model).abs() < 1e-6
    other = tiny.decoder(seed=1)
    assert loss_of(replay, other) > 0.1


def test_the_base_target_is_the_whole_divergence_where_every_token_is_kept():
    model, other, told = tiny.decoder(), tiny.decoder(seed=1), examples(4)
    replay = Replay(told, tiny.PAD, batch_size=4, target="base", num_kept=tiny.VOCAB, loss_on="answer")
    replay.begin(model)
    found = []
    for example in told:
        ids_1L = torch.tensor([example["input_ids"]])
        before, after = (F.log_softmax(each(ids_1L).logits[0, 2:-1], dim=-1) for each in (model, other))
        found += (before.exp() * (before - after)).sum(-1).tolist()
    torch.testing.assert_close(loss_of(replay, other), torch.tensor(sum(found) / len(found)))


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_keeping_fewer_tokens_never_makes_a_divergence_larger(seed, kept):
    generator = torch.Generator().manual_seed(seed)
    before, after = 4 * torch.randn(2, 1, 3, 10, generator=generator)
    logp_BLC = F.log_softmax(before, dim=-1)
    whole = F.kl_div(F.log_softmax(after, dim=-1), logp_BLC, log_target=True, reduction="none").sum(-1)
    top = logp_BLC.topk(kept)
    part = kl_of_kept(top.values, top.indices, after)
    assert (part <= whole + 1e-4).all()
    assert (part >= -1e-4).all()


def test_a_draw_depends_on_the_step_alone_and_micro_batches_differ():
    one, other = (Replay(examples(), tiny.PAD, batch_size=3) for _ in range(2))
    model = tiny.decoder()
    for step in range(5):
        loss_of(one, model, step)
    assert loss_of(one, model, 7) == loss_of(other, model, 7)
    assert loss_of(one, model, 7) != loss_of(other, model, 8)
    first = loss_of(one, model, 9)
    assert loss_of(one, model, 9) != first  # the next micro-batch of the step


def test_fewer_examples_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="replay of 8 examples a step, there are 3"):
        Replay(examples(3), tiny.PAD)

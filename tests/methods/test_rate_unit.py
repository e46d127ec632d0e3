"""A learning rate in units that the lessons tell: what a step of such a rate does is the same in every model."""

import math

import pytest
import tiny
import torch
from finetuning import finetuner_of

from memlayer.decoders.attach import memory_tables
from memlayer.methods.rate_unit import LOOKED_AT, rate_of_one


def heard(loudness=1.0):
    """The tiny decoder whose memory is heard ``loudness`` times as loud, with empty values."""
    model = tiny.memory_model()
    with torch.no_grad():
        memory_tables(model)[tiny.TABLE].weight.zero_()
        model.model.layers[1].mlp.out.weight *= loudness
    return model


@pytest.mark.parametrize("damping", [0.0, 4.0])
def test_a_small_part_of_it_takes_that_part_of_the_loss_away(damping):
    model, part = heard(), 1e-3
    finetuner = finetuner_of(model, damping=damping, num_rows=20)
    rate = part * finetuner.whole_step(tiny.batch())
    optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=rate))
    before = finetuner.loss(tiny.batch())
    before.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        after = finetuner.loss(tiny.batch())
    assert (before - after).item() == pytest.approx(part * before.item(), rel=0.05)


def test_damping_makes_the_steps_shorter_so_one_is_a_larger_rate():
    plain, damped = (finetuner_of(heard(), damping=damping).whole_step(tiny.batch()) for damping in (0.0, 4.0))
    assert damped > 1.1 * plain


def test_a_memory_that_is_heard_ten_times_as_loud_has_a_hundredth_of_the_rate():
    quiet, loud = (rate_of_one(finetuner_of(heard(loudness)), [tiny.batch()]) for loudness in (0.1, 1.0))
    assert quiet / loud == pytest.approx(100, rel=1e-3)


def test_looking_changes_nothing_and_the_next_step_is_that_of_a_new_finetuner():
    moved = []
    for looks in (0, 3):
        model = heard()
        finetuner = finetuner_of(model)
        optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=1.0))
        before = tiny.snapshot(model)
        for seed in range(looks):
            finetuner.whole_step(tiny.batch(seed=seed))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any(len(slots) for slots in finetuner.selected.values())
        finetuner.loss(tiny.batch()).backward()
        optimizer.step()
        moved.append(finetuner.detach().tables[tiny.TABLE].rows)
    assert torch.equal(*moved)


def test_the_median_lesson_tells_it_of_as_many_as_are_looked_at():
    finetuner, looked_at = finetuner_of(heard()), []

    class Lessons(list):
        def __getitem__(self, number):
            looked_at.append(number)
            return super().__getitem__(number)

    rates = sorted(finetuner.whole_step(tiny.batch(seed=seed)) for seed in range(3))
    assert rate_of_one(finetuner, [tiny.batch(seed=seed) for seed in range(3)]) == rates[1]
    rate_of_one(finetuner, Lessons([tiny.batch()] * 100))
    assert len(looked_at) == LOOKED_AT
    assert (looked_at[0], looked_at[-1]) == (0, 96)


def test_lessons_that_tell_nothing_are_refused():
    with pytest.raises(ValueError, match="there are no lessons to tell the rate by"):
        rate_of_one(finetuner_of(heard()), [])
    deaf = finetuner_of(heard(loudness=0.0))
    assert deaf.whole_step(tiny.batch()) == math.inf
    with pytest.raises(ValueError, match="their loss does not change with the rows"):
        rate_of_one(deaf, [tiny.batch()])

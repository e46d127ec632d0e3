"""The losses equal sums that are written out, and a lesson's wordings are what is pulled together."""

import math

import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memlayer.methods.infonce import (
    lesson_losses,
    next_of_its_label,
    projection,
    prompt_ends,
    released_infonce,
    supervised_infonce,
)
from memlayer.methods.sparse_mask import choose, linear_weights


def surprises(z, tau, out=()):
    """-log of exp(cosine of i and j over tau) as a share of the sum of these over all others than i."""
    unit = torch.nn.functional.normalize(z.double(), dim=1)
    e = [[torch.exp(unit[i] @ unit[k] / tau) for k in range(len(z))] for i in range(len(z))]
    totals = [sum(e[i][k] for k in range(len(z)) if k != i and (i, k) not in out) for i in range(len(z))]
    return lambda i, j: -torch.log(e[i][j] / totals[i])


def brute_force(z, labels, tau, out=()):
    rows, surprise = [], surprises(z, tau, out)
    for i, label in enumerate(labels):
        positives = [j for j, other in enumerate(labels) if j != i and other == label and (i, j) not in out]
        if positives:
            rows.append(sum(surprise(i, j) for j in positives) / len(positives))
    return sum(rows) / len(rows)


labels_of = st.lists(st.integers(0, 3), min_size=2, max_size=9)


@settings(deadline=None, max_examples=40)  # the sum written out takes its time
@given(labels_of, st.sampled_from([0.07, 0.5, 3.0]), st.integers(0, 2**32), st.data())
def test_the_loss_and_its_gradient_are_the_sum_written_out(labels, tau, seed, data):
    """Rows without a positive are among them, and pairs that are ignored."""
    pairs = [(i, j) for i in range(len(labels)) for j in range(len(labels)) if i != j]
    out = data.draw(st.sets(st.sampled_from(pairs), max_size=4))
    assume(any(labels[i] == labels[j] and (i, j) not in out for i, j in pairs))
    ignore = torch.zeros(len(labels), len(labels), dtype=torch.bool)
    for i, j in out:
        ignore[i, j] = True
    z = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    expected = brute_force(z, labels, tau, out)
    found = supervised_infonce(z, torch.tensor(labels), tau, ignore if out else None)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)  # float32
    theirs, ours = (torch.autograd.grad(loss, z)[0] for loss in (expected, found))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_loss_is_low_where_labels_are_directions_and_high_where_they_are_not():
    z, labels = torch.eye(3).repeat(2, 1), torch.tensor([0, 1, 2, 0, 1, 2])
    assert supervised_infonce(z, labels) < 1e-4
    assert supervised_infonce(z, torch.tensor([0, 0, 1, 1, 2, 2])) > 5
    assert supervised_infonce(5 * z, labels) == supervised_infonce(z, labels), "only directions count"
    assert supervised_infonce(z.bfloat16(), labels).dtype == torch.float32


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 2**32))
def test_the_released_loss_counts_each_row_among_its_own_positives(classes, seed):
    """Two views of each example, so that row i and row i + B are twins; as described, with 1e-8 for the row itself."""
    labels, half = classes * 2, len(classes)
    twins = torch.tensor([*range(half, 2 * half), *range(half)])
    z = torch.randn(2 * half, 5, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    tau, expected, without_itself = 0.5, 0.0, 0.0
    surprise = surprises(z, tau)
    for i, label in enumerate(labels):
        same = [j for j, other in enumerate(labels) if other == label]
        instance = surprise(i, int(twins[i]))
        others = sum(surprise(i, j) for j in same if j != i) / len(same)
        itself = -math.log(1e-8) / len(same)
        expected = expected + (instance + 2 * (others + itself)) / len(labels)
        without_itself = without_itself + (instance + 2 * others) / len(labels)
    found = released_infonce(z, torch.tensor(labels), twins, tau)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)  # float32
    constant = 2 * math.log(1e8) * len(set(labels)) / len(labels)
    torch.testing.assert_close(found - without_itself.float(), torch.tensor(constant), rtol=1e-3, atol=1e-4)
    theirs, ours = (torch.autograd.grad(loss, z)[0] for loss in (without_itself, found))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_constant_is_what_the_authors_logs_hold_too_much():
    """About 9.25 at 32 examples of 20 classes in two views, which their log's 13.07 includes.

    Where all rows are alike, each p is 1 / 63.
    """
    draw, excess = torch.Generator().manual_seed(0), []
    twins, alike = torch.arange(64).roll(32), torch.ones(64, 3)
    for _ in range(50):
        labels = torch.randint(20, (32,), generator=draw).repeat(2)
        count = (labels[:, None] == labels).sum(1)
        without_itself = math.log(63) * (1 + 2 * ((count - 1) / count).mean())
        excess.append(float(released_infonce(alike, labels, twins) - without_itself))
    assert sum(excess) / 50 == pytest.approx(9.25, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.ones(2, 3), torch.tensor([0, 1])), "none of 2 rows has another one of its label"),
        ((torch.ones(2, 3), torch.tensor([0, 0, 1])), r"have shapes \[\[2, 3\], \[3\]\], must be"),
        ((torch.ones(2, 3), torch.tensor([0, 0]), 0.0), "temperature is 0.0, must be above 0"),
        ((torch.ones(2, 3), torch.tensor([0, 0]), 1.0, torch.ones(3, 3).bool()), "have shapes"),
    ],
)
def test_what_cannot_be_contrasted_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        supervised_infonce(*arguments)


def test_the_end_of_a_prompt_does_not_depend_on_its_answer_or_the_padding():
    model, batch = tiny.decoder(), tiny.batch(lengths=(7, 5, 9))
    ends_BD = prompt_ends(model, batch)
    for row, length in enumerate((7, 5, 9)):
        prompt = batch["input_ids"][row : row + 1, : length - 2]
        hidden = model.model(input_ids=prompt)[0]
        torch.testing.assert_close(ends_BD[row], hidden[0, -1], rtol=1e-4, atol=1e-5)  # float32


def test_losses_of_lessons_are_those_of_their_prompts_each_lesson_once():
    model, lessons = tiny.decoder(), [tiny.batch(seed=seed) for seed in range(3)]
    head = projection(tiny.WIDTH, seed=0)
    (found,) = lesson_losses(model, head, lessons)
    z = torch.cat([head(prompt_ends(model, batch)) for batch in lessons])
    expected = brute_force(z, [0] * 4 + [1] * 4 + [2] * 4, 0.07)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)  # float32
    many = [tiny.batch(seed=seed) for seed in range(17)]
    seen = []

    def count(z, labels):
        seen.append(len(labels.unique()))
        return supervised_infonce(z, labels)

    with torch.no_grad():
        assert len(list(lesson_losses(model, head, many, loss=count))) == 2
    assert sorted(seen) == [8, 9]


def test_lessons_that_cannot_be_told_apart_are_refused():
    model, head = tiny.decoder(), projection(tiny.WIDTH, seed=0)
    with pytest.raises(ValueError, match="1 of them is too few"):
        next(lesson_losses(model, head, [tiny.batch()]))
    text = tiny.batch()
    text["answer_mask"] = text["attention_mask"]
    with pytest.raises(ValueError, match="an example has no prompt before its answer"):
        next(lesson_losses(model, head, [text, text]))


def test_a_projection_is_drawn_by_its_seed_and_draws_nothing_of_the_callers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, other, again = (projection(4, seed) for seed in (1, 2, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.weight, again.weight)
    assert not torch.equal(one.weight, other.weight)


def test_twins_go_round_within_a_label():
    assert next_of_its_label(torch.tensor([0, 1, 0, 1, 0])).tolist() == [2, 3, 4, 1, 0]
    with pytest.raises(ValueError, match="the only row of label 1 has no twin"):
        next_of_its_label(torch.tensor([0, 1, 0]))


def test_the_score_infonce_chooses_where_lessons_are_told_apart():
    """Not what follows the prompt's last hidden state, and other numbers than the loss on answers."""
    model, lessons = tiny.decoder(), [tiny.batch(seed=seed) for seed in range(3)]
    chosen, fisher = (choose(model, score, 0.1, 0, lessons) for score in ("infonce", "fisher"))
    assert {name: len(index_C) for name, index_C in chosen.items()} == {
        name: round(0.1 * p.numel()) for name, p in linear_weights(model).items()
    }
    assert any(not torch.equal(chosen[name], fisher[name]) for name in chosen)
    head = projection(tiny.WIDTH, seed=0)
    (loss,) = lesson_losses(model, head, lessons)
    name = "model.layers.0.self_attn.q_proj.weight"
    gradient = torch.autograd.grad(loss, model.get_parameter(name))[0].abs().flatten()
    assert set(chosen[name].tolist()) == set(gradient.topk(len(chosen[name])).indices.tolist())

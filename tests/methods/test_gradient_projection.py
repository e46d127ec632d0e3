"""A projected step does not go against the reference, and differs from the batch's own as little as can be."""

from contextlib import nullcontext

import pytest
import tiny
import torch
from finetuning import finetuner_of
from hypothesis import given
from hypothesis import strategies as st

from memlayer.data.qa import collate
from memlayer.methods.gradient_projection import AGem, project


def drawn(seed, shapes=((2, 3), (4,))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def flat(tensors):
    return torch.cat([tensor.flatten().double() for tensor in tensors])


@given(st.integers(0, 2**16), st.integers(0, 2**16))
def test_the_projection_is_the_nearest_step_that_does_not_go_against_the_reference(seed, other):
    gradients, reference = drawn(seed), drawn(other)
    found = project(gradients, reference)
    g, r, new = flat(gradients), flat(reference), flat(found)
    if g @ r >= 0:
        assert all(one is two for one, two in zip(found, gradients))
        return
    torch.testing.assert_close(new, g - (g @ r) / (r @ r) * r, atol=1e-5, rtol=0)  # float32
    assert new @ r >= -1e-4  # float32
    for nudge in range(5):  # whatever else does not go against it lies farther away
        candidate = new + 0.1 * flat(drawn(nudge))
        if candidate @ r >= 0:
            assert (candidate - g).norm() >= (new - g).norm() - 1e-6


def test_a_reference_of_zeros_changes_nothing():
    gradients = drawn(0)
    assert project(gradients, [torch.zeros_like(g) for g in gradients]) == gradients


def test_nothing_counts_as_zero_and_sparse_gradients_as_what_they_hold():
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    found = project([one, None, None, other], [-one, other, None, None])
    assert [None if each is None else each.tolist() for each in found] == [[0.5, 0.0], [0.0, 0.5], None, [0.0, 1.0]]
    gradients, reference = drawn(0), [-g for g in drawn(0)]
    sparse = project([gradients[0].to_sparse(1), gradients[1]], [reference[0].to_sparse(1), reference[1]])
    assert sparse[0].is_sparse
    for ours, theirs in zip(sparse, project(gradients, reference)):
        torch.testing.assert_close(ours.to_dense(), theirs)


def lessons(other_answers):
    """Four sequences of which the last two tokens are the answer; two sets share the prompts."""
    rows = tiny.batch(seed=1)["input_ids"].tolist()
    if other_answers:
        rows = [row[:-2] + [4 + (token + 7) % (tiny.VOCAB - 4) for token in row[-2:]] for row in rows]
    return [{"input_ids": row, "answer_start": 5, "length": 7} for row in rows]


def step(model, terms=(), finetuner=None, rate=1e-4):
    """One small step on new answers; returns by how much the loss on the old ones has grown."""
    old, new = (collate(lessons(each), tiny.PAD, "answer") for each in (True, False))

    def remembered():
        with torch.no_grad():
            return float(model(**tiny.inputs(old)).loss.double())

    before = remembered()
    parameters = finetuner.parameters() if finetuner else list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=rate)
    if finetuner:
        optimizer = finetuner.watch(optimizer)
    with finetuner.selecting(new) if finetuner else nullcontext():
        out = model(**tiny.inputs(new))
    with finetuner.alongside() if finetuner else nullcontext():
        assert [term.loss(model, new, out.logits) for term in terms] == [None] * len(terms)
    out.loss.backward()
    for term in terms:
        term.after_backward(parameters)
    optimizer.step()
    optimizer.zero_grad()
    return remembered() - before


def model_that_knows():
    """A model with memory that has begun to know the old answers."""
    model = tiny.memory_model(mode="add")
    model.model.layers[1].mlp.memory.out.weight.data.normal_()
    batch, optimizer = collate(lessons(True), tiny.PAD, "answer"), torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(15):
        model(**tiny.inputs(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("sparse", [False, True])
def test_a_small_step_hardly_raises_the_loss_on_what_is_remembered(sparse):
    model = model_that_knows()
    model.model.memory[0].sparse = sparse
    plain = step(model_that_knows())
    term = AGem(lessons(True), tiny.PAD, batch_size=4, loss_on="answer")
    assert step(model, [term]) < plain / 10
    assert plain > 1e-5
    assert (term.projected, term.examples, term.tokens) == (1, 4, 28)


def test_with_sparse_memory_finetuning_the_chosen_rows_go_with_what_is_remembered():
    grown = []
    for with_term in (False, True):
        model = model_that_knows()
        before = tiny.snapshot(model)
        term = AGem(lessons(True), tiny.PAD, batch_size=4, loss_on="answer")
        finetuner = finetuner_of(model, num_rows=20)
        grown.append(step(model, [term] * with_term, finetuner, rate=0.01))
        assert term.projected == with_term
        finetuner.detach()
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == {"model.memory.0.weight"}
    assert grown[0] > 1e-5
    assert grown[1] < grown[0] / 10


def test_what_does_not_go_against_what_is_remembered_is_the_step_itself():
    one, other = tiny.decoder(), tiny.decoder()
    term = AGem(lessons(False), tiny.PAD, batch_size=4, loss_on="answer")
    step(one, [term])
    step(other)
    assert term.projected == 0
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("reference", "words"),
    [([torch.ones(2, 3)], "2 gradients and 1"), ([torch.ones(4), torch.ones(4)], r"gradient 0 is \(2, 3\)")],
)
def test_gradients_of_other_parameters_are_refused(reference, words):
    with pytest.raises(ValueError, match=words):
        project(drawn(0), reference)

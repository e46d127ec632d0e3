"""A projected step does not go against the reference, and differs from the batch's own as little as can be."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlayer.methods.gradient_projection import project, project_gradients


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


def gradients_of(model, batch):
    loss = model(**tiny.inputs(batch)).loss
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def test_a_small_step_of_projected_gradients_does_not_raise_the_remembered_loss():
    model = tiny.memory_model(mode="add").train()
    model.model.layers[1].mlp.memory.out.weight.data.normal_()
    new, old = tiny.batch(seed=1), tiny.batch(seed=2)
    old["labels"] = torch.where(new["labels"] > 0, (new["labels"] + 7) % tiny.VOCAB, -100)
    old["input_ids"] = new["input_ids"]  # the same texts with other answers: the gradients are at odds

    def remembered_after(projected):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            loss = float(model(**tiny.inputs(old)).loss)
        reference = gradients_of(model, old)
        model(**tiny.inputs(new)).loss.backward()
        changed = project_gradients(list(model.parameters()), reference) if projected else None
        against = float(flat([p.grad for p in model.parameters()]) @ flat(reference))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
            after = float(model(**tiny.inputs(old)).loss)
        model.zero_grad()
        model.load_state_dict(before, strict=False)
        return after - loss, against, changed

    plain, against, _ = remembered_after(False)
    assert plain > 0 > against
    held, against, changed = remembered_after(True)
    assert changed
    assert abs(against) < 1e-4
    assert held < plain / 10


def test_a_parameter_without_a_gradient_counts_as_zero():
    one, other, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    one.grad = torch.tensor([1.0, 0.0])
    assert project_gradients([one, other, unused], [torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 1.0]), None])
    assert one.grad.tolist() == [0.5, 0.0]
    assert other.grad.tolist() == [0.0, 0.5]
    assert unused.grad is None
    one.grad = torch.tensor([1.0, 0.0])
    assert not project_gradients([one], [torch.tensor([1.0, 5.0])])
    assert one.grad.tolist() == [1.0, 0.0]


def test_gradients_of_other_parameters_are_refused():
    with pytest.raises(ValueError, match="2 gradients and 1 of the reference"):
        project(drawn(0), drawn(0)[:1])

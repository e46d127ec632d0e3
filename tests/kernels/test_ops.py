"""memory_lookup on the CPU equals the reference: reads, and the gradients of values, weights and rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from memlayer_kernels import cpu, library, ops, reference

# bfloat16 keeps 8 bits; float32 sums of a few dozen terms in two orders
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


def draw(seed=0, num_tokens=5, num_slots=20, top_k=6, width=7, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(num_slots, width, generator=random).to(dtype).requires_grad_()
    slots = torch.randint(num_slots, (num_tokens, top_k), generator=random)
    weights = torch.randn(num_tokens, top_k, generator=random).to(dtype).requires_grad_()
    return values, slots, weights


def choose(values, chosen):
    """Rows for the chosen slots and the map to them."""
    row_of_slot = torch.full((values.shape[0],), -1, dtype=torch.int32)
    row_of_slot[chosen] = torch.arange(len(chosen), dtype=torch.int32)
    return values.detach()[chosen].clone().requires_grad_(), row_of_slot


def gradients(reads, inputs):
    """Gradients of a function that weighs every number differently; dense, zeros where there is none."""
    upstream = torch.arange(reads.numel()).view_as(reads).cos().to(reads.dtype)
    grads = torch.autograd.grad(reads, inputs, upstream, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g.to_dense() if g.is_sparse else g for g, i in zip(grads, inputs)]


def check(values, slots, weights, rows=None, row_of_slot=None, sparse_grad=False):
    inputs = [values, weights] if rows is None else [values, weights, rows]
    found = ops.memory_lookup(values, slots, weights, rows, row_of_slot, sparse_grad=sparse_grad)
    expected = reference.memory_lookup(values, slots.long(), weights, rows, row_of_slot)
    assert found.dtype == values.dtype
    torch.testing.assert_close(found, expected, **TOLERANCE[values.dtype])
    for grad, right in zip(gradients(found, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(grad, right, **TOLERANCE[values.dtype])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_reference(data):
    size = st.integers(1, 9)
    num_slots = data.draw(size)
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    inputs = draw(data.draw(st.integers(0, 99)), data.draw(size), num_slots, data.draw(size), data.draw(size), dtype)
    chosen = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True))
    if data.draw(st.booleans()):
        check(*inputs, *choose(inputs[0], chosen))
    else:
        check(*inputs, sparse_grad=data.draw(st.booleans()))


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(num_tokens, sparse_grad):
    check(*draw(num_tokens=num_tokens), sparse_grad=sparse_grad)
    inputs = draw(num_tokens=num_tokens)
    check(*inputs, *choose(inputs[0], [3, 4]))


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_repeated_slots_and_every_read_on_one_slot(sparse_grad):
    values, slots, weights = draw()
    slots[:, 3:] = slots[:, :3]
    check(values, slots, weights, sparse_grad=sparse_grad)
    slots.fill_(11)
    check(values, slots, weights, sparse_grad=sparse_grad)
    check(values, slots, weights, *choose(values, [2, 11]))


@pytest.mark.parametrize("chosen", [[], list(range(20))])
def test_no_rows_and_all_rows(chosen):
    inputs = draw()
    check(*inputs, *choose(inputs[0], chosen))


def test_int32_slots_and_strided_inputs():
    values, slots, weights = draw(top_k=8, width=12)
    check(values[:, :7], slots[:, ::2].int(), weights[:, ::2])
    check(values, slots, weights.detach().t().contiguous().t().requires_grad_())


def test_weights_of_another_dtype_get_a_gradient_in_it():
    values, slots, weights = draw()
    low = weights.detach().bfloat16().requires_grad_()
    ops.memory_lookup(values, slots, low).sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert values.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_dtype", [None, torch.float32])
@pytest.mark.parametrize("num_slots", [20, 4000])
def test_sums_of_16_bit_values_are_rounded_once(dtype, weights_dtype, num_slots):
    """Where a sum is rounded after every term it is wrong in the fourth digit; weights in float32 are not rounded."""
    values, slots, weights = (t.detach() for t in draw(0, 8, num_slots, 300, 40))
    values, weights = values.to(dtype), weights.abs().to(weights_dtype or dtype)
    exact = (values.double()[slots] * weights.double().unsqueeze(-1)).sum(1)
    found = ops.memory_lookup(values, slots, weights)
    assert found.dtype == dtype
    assert (found == exact.to(dtype)).float().mean() > 0.98


def test_a_constant_upstream_gradient_of_stride_zero():
    values, slots, weights = draw()
    ops.memory_lookup(values, slots, weights).sum().backward()
    torch.testing.assert_close(weights.grad, values.detach()[slots].sum(-1))


def test_gradcheck():
    values, slots, weights = draw(dtype=torch.float64)
    slots[:, 4:] = slots[:, :2]
    assert torch.autograd.gradcheck(lambda v, w: ops.memory_lookup(v, slots, w), (values, weights))


def test_gradcheck_of_rows():
    """By differences: the reads do not depend on the rows, so the rows are written into the values first."""
    values, slots, weights = draw(dtype=torch.float64)
    rows, row_of_slot = choose(values, [2, 3, 5, 7])
    reads = ops.memory_lookup(values, slots, weights, rows, row_of_slot)
    grad_rows = torch.autograd.grad(reads.square().sum(), rows)[0]
    for row, slot in enumerate([2, 3, 5, 7]):
        moved = values.detach().clone()
        moved[slot, 1] += 1e-6
        rise = ops.memory_lookup(moved, slots, weights).square().sum() - reads.square().sum()
        torch.testing.assert_close(grad_rows[row, 1], rise / 1e-6, rtol=1e-4, atol=1e-4)


def test_sparse_gradient_holds_the_distinct_slots_in_order():
    values, slots, weights = draw()
    reads = ops.memory_lookup(values, slots, weights, sparse_grad=True)
    (grad,) = torch.autograd.grad(reads.sum(), values)
    assert grad.is_coalesced()
    assert torch.equal(grad.indices()[0], slots.unique())
    assert grad.values().shape == (len(slots.unique()), 7)


def test_rows_take_the_gradient_of_their_slots_and_nothing_else_does():
    values, slots, weights = draw()
    rows, row_of_slot = choose(values, [int(slots[0, 0]), int(slots[1, 1])])
    ops.memory_lookup(values, slots, weights, rows, row_of_slot).sum().backward()
    assert values.grad is None
    assert rows.grad.shape == rows.shape
    assert rows.grad.any(dim=1).all()


def test_row_of_slot_is_read_when_backward_runs_and_rows_never():
    values, slots, weights = draw()
    rows, filled = choose(values, [int(slots[0, 0]), int(slots[2, 2]), int(slots[3, 3])])
    row_of_slot = torch.full_like(filled, -1)
    rows = torch.full_like(rows, torch.nan).requires_grad_()
    reads = ops.memory_lookup(values, slots, weights, rows, row_of_slot)
    row_of_slot.copy_(filled)
    rows.data.fill_(torch.inf)
    reads.sum().backward()
    expected_rows = values.detach()[: len(rows)].clone().requires_grad_()
    expected = reference.memory_lookup(values, slots, weights, expected_rows, filled)
    torch.testing.assert_close(reads, expected)
    torch.testing.assert_close(rows.grad, torch.autograd.grad(expected.sum(), expected_rows)[0])


def test_values_may_be_written_between_forward_and_backward_where_weights_need_no_gradient():
    values, slots, weights = draw()
    values, weights = values.detach(), weights.detach()
    rows, row_of_slot = choose(values, [int(slots[0, 0])])
    reads = ops.memory_lookup(values, slots, weights, rows, row_of_slot)
    values.zero_()
    reads.sum().backward()
    expected = (weights * (slots == slots[0, 0])).sum()
    torch.testing.assert_close(rows.grad, expected.expand_as(rows))


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_values_that_want_a_gradient_may_be_written_too(sparse_grad):
    values, slots, weights = draw()
    reads = ops.memory_lookup(values, slots, weights.detach(), sparse_grad=sparse_grad)
    with torch.no_grad():
        values.zero_()
    (grad,) = gradients(reads, [values])
    assert torch.equal(grad, gradients(ops.memory_lookup(values, slots, weights.detach()), [values])[0])


def test_gradients_add_up_over_micro_batches():
    values, slots, weights = draw(num_tokens=8)
    for sparse_grad in (False, True):
        values.grad = None
        for part in (slice(0, 4), slice(4, 8)):
            ops.memory_lookup(values, slots[part], weights[part], sparse_grad=sparse_grad).sum().backward()
        whole = torch.autograd.grad(ops.memory_lookup(values, slots, weights).sum(), values)[0]
        torch.testing.assert_close(values.grad.to_dense(), whole)


def test_activation_checkpointing_gives_the_same_gradients():
    values, slots, weights = draw()
    rows, row_of_slot = choose(values, [1, 2, 3])

    def lookup(weights):
        return ops.memory_lookup(values, slots, weights.softmax(-1), rows, row_of_slot)

    plain = torch.autograd.grad(lookup(weights).square().sum(), (weights, rows))
    again = torch.autograd.grad(checkpoint(lookup, weights, use_reentrant=False).square().sum(), (weights, rows))
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    values, slots, weights = draw(dtype=dtype)
    expected = ops.memory_lookup(values, slots, weights)
    with torch.autocast("cpu", torch.bfloat16):
        reads = ops.memory_lookup(values, slots, weights)
        reads.sum().backward()
    assert torch.equal(reads, expected)
    assert values.grad.dtype == dtype


def test_two_runs_give_identical_bits():
    inputs = draw(num_tokens=300, num_slots=40, top_k=16, width=33)
    rows, row_of_slot = choose(inputs[0], list(range(0, 40, 3)))

    def run(*rows_and_map):
        reads = ops.memory_lookup(*inputs, *rows_and_map)
        return [reads, *gradients(reads, [*inputs[::2], *rows_and_map[:1]])]

    for arguments in ((), (rows, row_of_slot)):
        assert all(torch.equal(a, b) for a, b in zip(run(*arguments), run(*arguments)))


def test_only_inputs_that_need_a_gradient_get_one():
    values, slots, weights = draw()
    assert not ops.memory_lookup(values.detach(), slots, weights.detach()).requires_grad
    ops.memory_lookup(values.detach(), slots, weights).sum().backward()
    assert values.grad is None
    assert weights.grad.any()


@pytest.mark.parametrize("wanted", ["values", "sparse values", "weights", "rows", "search"])
def test_a_second_differentiation_is_refused(wanted):
    values, slots, weights = draw()
    if wanted == "search":
        inputs = torch.randn(2, 1, 2, 3).requires_grad_()
        result = ops.product_key_topk(inputs, torch.randn(1, 2, 4, 3), 2)[0]
    elif wanted == "rows":
        inputs, row_of_slot = choose(values, [1, 2])
        result = ops.memory_lookup(values, slots, weights, inputs, row_of_slot)
    else:
        inputs = weights if wanted == "weights" else values
        result = ops.memory_lookup(values, slots, weights, sparse_grad=wanted == "sparse values")
    (grad,) = torch.autograd.grad(result.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.to_dense().sum().backward()


def test_no_work_is_done_for_gradients_that_nobody_wants(monkeypatch):
    """Neither products for the weights nor a sort of all reads when only rows want a gradient."""
    monkeypatch.setattr(library, "sort_reads", None)
    monkeypatch.setattr(cpu, "read_products", None)
    values, slots, weights = (t.detach() for t in draw())
    rows, row_of_slot = choose(values, [int(slots[0, 0])])
    ops.memory_lookup(values, slots, weights, rows, row_of_slot).sum().backward()
    assert rows.grad.any()
    frozen = ops.memory_lookup(values, slots, weights.requires_grad_(), rows.detach(), row_of_slot)
    with pytest.raises(TypeError):  # the sort is wanted here
        frozen.sum().backward()

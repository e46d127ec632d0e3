"""What can only be seen on a GPU: what the host waits for, what memory is taken, tables past 2^31 elements.

That the numbers are right there is tested by the other files of this folder, which run on a GPU where there is one.
"""

import pytest
import torch

from memlayer_kernels import ops, reference, rows

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
TOKENS, READS, WIDTH, ROWS = 64, 32, 256, 50


def draw(num_slots, dtype=torch.float32, slots_below=None):
    """Values, slots, weights, and rows with the map of slots to them; slots_below bounds what is read."""
    torch.manual_seed(0)
    slots = torch.randint(slots_below or num_slots, (TOKENS, READS), device=GPU)
    row_of_slot = torch.full((num_slots,), -1, dtype=torch.int32, device=GPU)
    row_of_slot[:ROWS] = torch.arange(ROWS, dtype=torch.int32, device=GPU)
    weights = torch.rand(TOKENS, READS, device=GPU).to(dtype).requires_grad_()
    values = torch.randn(num_slots, WIDTH, device=GPU).to(dtype)
    return values, slots, weights, torch.zeros(ROWS, WIDTH, dtype=dtype, device=GPU).requires_grad_(), row_of_slot


@pytest.fixture
def without_waiting():
    """A function that runs another one twice, the second time with every wait of the host for the GPU an error."""

    def run(function):
        function()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


def test_a_wait_of_the_host_is_an_error(without_waiting):
    number = torch.ones(1, device=GPU)
    calls = iter([lambda: None, number.item])
    with pytest.raises(RuntimeError, match="synchronizing"):
        without_waiting(lambda: next(calls)())


def test_lookup_and_backward_into_weights_and_rows_do_not_wait(without_waiting):
    values, slots, weights, chosen, row_of_slot = draw(1000)

    def step():
        reads = ops.memory_lookup(values, slots, weights, chosen, row_of_slot)
        return torch.autograd.grad(reads, (weights, chosen), torch.ones_like(reads))

    assert all(grad.any() for grad in without_waiting(step))


def test_backward_into_dense_values_does_not_wait(without_waiting):
    values, slots, weights, *_ = draw(1000)
    values.requires_grad_()

    def step():
        reads = ops.memory_lookup(values, slots, weights)
        return torch.autograd.grad(reads, values, torch.ones_like(reads))

    assert without_waiting(step)[0].any()


def test_search_and_its_backward_do_not_wait(without_waiting):
    queries = torch.randn(TOKENS, 4, 2, 64, device=GPU, requires_grad=True)
    half_keys = torch.randn(4, 2, 100, 64, device=GPU, requires_grad=True)

    def step():
        scores, _ = ops.product_key_topk(queries, half_keys, 8)
        return torch.autograd.grad(scores, (queries, half_keys), torch.ones_like(scores))

    assert all(grad.any() for grad in without_waiting(step))


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_row_optimizers_do_not_wait(without_waiting, method):
    values = torch.randn(100, WIDTH, device=GPU)
    moments, steps = torch.zeros(2, 100, WIDTH, device=GPU), torch.zeros(100, device=GPU)
    slots, grad = torch.arange(0, 100, 3, device=GPU), torch.randn(34, WIDTH, device=GPU)
    before = values.clone()
    if method == "sgd":
        without_waiting(lambda: rows.sgd_rows_(values, slots, grad, lr=0.1))
    else:
        without_waiting(lambda: rows.adam_rows_(values, slots, grad, *moments, steps, 0.1, 0.9, 0.999, 1e-8))
    assert (values != before).any(1).sum() == 34


def test_memory_of_backward_into_rows_does_not_depend_on_the_table():
    taken = []
    for num_slots in (2**12, 2**20):
        values, slots, weights, chosen, row_of_slot = draw(num_slots, slots_below=2**12)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        reads = ops.memory_lookup(values, slots, weights, chosen, row_of_slot)
        torch.autograd.grad(reads, (weights, chosen), torch.ones_like(reads))
        taken.append(torch.cuda.max_memory_allocated() - before)
        del values, reads
    assert taken[0] == taken[1] < 2**20 * WIDTH


def test_float64_has_float64_results():
    values, slots, weights, chosen, row_of_slot = draw(1000, torch.float64)
    reads = ops.memory_lookup(values, slots, weights, chosen, row_of_slot)
    expected = reference.memory_lookup(values, slots, weights, chosen, row_of_slot)
    torch.testing.assert_close(reads, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(reads.square().sum(), (weights, chosen))
    for grad, right in zip(found, torch.autograd.grad(expected.square().sum(), (weights, chosen))):
        torch.testing.assert_close(grad, right, rtol=1e-12, atol=1e-12)
    queries = torch.randn(5, 2, 2, 7, dtype=torch.float64, device=GPU)
    half_keys = torch.randn(2, 2, 11, 7, dtype=torch.float64, device=GPU)
    found, expected = (module.product_key_topk(queries, half_keys, 3) for module in (ops, reference))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1], expected[1])


def test_rows_past_two_to_the_31_elements():
    num_slots = 2**31 // WIDTH + 2
    values = torch.zeros(num_slots, WIDTH, dtype=torch.bfloat16, device=GPU)
    last = torch.tensor([num_slots - 2, num_slots - 1], device=GPU)
    values[last] = torch.randn(2, WIDTH, device=GPU).bfloat16()
    weights = torch.ones(1, 2, dtype=torch.bfloat16, device=GPU, requires_grad=True)
    reads = ops.memory_lookup(values, last.view(1, 2), weights)
    torch.testing.assert_close(reads[0], values[last].float().sum(0).bfloat16())
    (grad,) = torch.autograd.grad(reads.sum(), weights)
    torch.testing.assert_close(grad[0], values[last].float().sum(1).bfloat16())
    rows.sgd_rows_(values, last, values[last].clone(), lr=1.0)
    assert not values[last].any()


def test_compiled_lookup_equals_eager():
    values, slots, weights, chosen, row_of_slot = draw(1000)

    def step(weights, chosen):
        return ops.memory_lookup(values, slots, weights, chosen, row_of_slot).square().sum()

    compiled = torch.compile(step, fullgraph=True)
    found = torch.autograd.grad(compiled(weights, chosen), (weights, chosen))
    for grad, right in zip(found, torch.autograd.grad(step(weights, chosen), (weights, chosen))):
        torch.testing.assert_close(grad, right)


def test_a_decoding_step_can_be_captured_in_a_graph():
    values, slots, weights, *_ = draw(1000)
    values, weights = values.detach(), weights.detach()
    expected = ops.memory_lookup(values, slots, weights)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reads = ops.memory_lookup(values, slots, weights)
    reads.zero_()
    graph.replay()
    assert torch.equal(reads, expected)

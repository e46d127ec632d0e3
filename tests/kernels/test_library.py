"""The registered operations: torch's own check of each, and torch.compile with one graph for every T."""

import pytest
import torch

from memlayer_kernels import library, ops

NUM_SLOTS, TOP_K, WIDTH = 20, 6, 7


def draw(num_tokens, seed=0):
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(NUM_SLOTS, WIDTH, generator=random, requires_grad=True)
    slots = torch.randint(NUM_SLOTS, (num_tokens, TOP_K), generator=random)
    return values, slots, torch.randn(num_tokens, TOP_K, generator=random, requires_grad=True)


def draw_search(num_tokens):
    random = torch.Generator().manual_seed(num_tokens)
    queries = torch.randn(num_tokens, 2, 2, 8, generator=random, requires_grad=True)
    return queries, torch.randn(2, 2, 6, 8, generator=random, requires_grad=True)


def arguments(name):
    values, slots, weights = draw(5)
    grad = torch.randn(5, WIDTH)
    row_of_slot = torch.arange(NUM_SLOTS, dtype=torch.int32) // 4 - 2
    return {
        "search": (*draw_search(5), 3),
        "lookup": (values, slots, weights, False),
        "lookup_gradients": (grad, slots, weights.detach(), values.detach(), NUM_SLOTS, torch.bfloat16),
        "lookup_gradients of values": (grad, slots, weights.detach(), None, NUM_SLOTS, torch.bfloat16),
        "lookup_gradients of weights": (grad, slots, weights.detach(), values.detach(), NUM_SLOTS, None),
        "row_sums": (grad, slots, weights.detach(), row_of_slot, 3, torch.float32),
    }[name]


OPERATIONS = ["search", "lookup", *(f"lookup_gradients{of}" for of in ("", " of values", " of weights")), "row_sums"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name):
    torch.library.opcheck(getattr(library, name.split()[0]), arguments(name))


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def dynamic(*tensors):
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)


def test_a_compiled_lookup_is_the_eager_one_for_every_number_of_tokens():
    def reads_and_gradients(lookup, values, slots, weights):
        reads = lookup(values, slots, weights)
        return [reads, *torch.autograd.grad(reads.square().sum(), (values, weights))]

    graph = compiled(ops.memory_lookup)
    for num_tokens in (5, 3, 17):
        inputs = draw(num_tokens)
        dynamic(*inputs[1:])
        with torch._dynamo.config.patch(error_on_recompile=num_tokens != 5):
            found = reads_and_gradients(graph, *inputs)
        expected = reads_and_gradients(ops.memory_lookup, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_a_compiled_search_is_the_eager_one_for_every_number_of_tokens():
    def scores_and_gradients(search, queries, half_keys):
        scores, slots = search(queries, half_keys, 3)
        return [scores, slots, *torch.autograd.grad(scores.cos().sum(), (queries, half_keys))]

    graph = compiled(ops.product_key_topk)
    for num_tokens in (5, 3, 17):
        inputs = draw_search(num_tokens)
        dynamic(inputs[0])
        with torch._dynamo.config.patch(error_on_recompile=num_tokens != 5):
            found = scores_and_gradients(graph, *inputs)
        expected = scores_and_gradients(ops.product_key_topk, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_a_compiled_lookup_reads_row_of_slot_when_backward_runs():
    graph = compiled(ops.memory_lookup)
    rows = torch.full((3, WIDTH), torch.nan, requires_grad=True)
    for num_tokens in (5, 3, 17):
        values, slots, weights = draw(num_tokens)
        values = values.detach()
        dynamic(slots, weights)
        gradients = []
        for lookup in (ops.memory_lookup, graph):
            row_of_slot = torch.full((NUM_SLOTS,), -1, dtype=torch.int32)
            with torch._dynamo.config.patch(error_on_recompile=num_tokens != 5):
                reads = lookup(values, slots, weights, rows, row_of_slot, sparse_grad=True)
            row_of_slot[slots[0, 0]] = 2
            gradients.append(torch.autograd.grad(reads.square().sum(), (weights, rows)))
        assert gradients[0][1][2].all()
        assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_sparse_gradient_is_left_out_of_graphs_and_refused_with_fullgraph():
    def sparse(values, slots, weights):
        return ops.memory_lookup(values, slots, weights, sparse_grad=True).square().sum()

    inputs = draw(5)
    graph = compiled(sparse)
    with torch.no_grad():
        assert torch.equal(graph(*inputs), sparse(*inputs))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="cannot return the sparse gradient"):
        graph(*inputs)
    broken = torch.compile(sparse, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(*inputs), inputs[0])[0] for f in (broken, sparse))
    assert found.is_sparse
    assert torch.equal(found.to_dense(), expected.to_dense())


@pytest.mark.slow
def test_inductor_gives_the_eager_gradients():
    """Apart from the others: it calls a C++ compiler."""

    def loss(values, slots, weights, queries, half_keys):
        scores, _ = ops.product_key_topk(queries, half_keys, 3)
        return ops.memory_lookup(values, slots, weights.softmax(-1)).square().sum() + scores.cos().sum()

    values, slots, weights = draw(5)
    queries, half_keys = draw_search(5)
    wanted = (values, weights, queries, half_keys)
    torch._dynamo.reset()
    found, expected = (
        torch.autograd.grad(f(values, slots, weights, queries, half_keys), wanted)
        for f in (torch.compile(loss, fullgraph=True), loss)
    )
    for grad, right in zip(found, expected):
        torch.testing.assert_close(grad, right)

"""A model with memory under torch.compile(fullgraph=True) computes what it computes without."""

import tiny
import torch

from memlayer.decoders.attach import memory_tables


def test_logits_of_a_compiled_model_are_those_of_the_model():
    model = tiny.memory_model()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = tiny.inputs(tiny.batch())
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, model(**batch).logits)


def test_rows_chosen_after_the_forward_of_a_compiled_model_get_their_gradient():
    model = tiny.memory_model().requires_grad_(False).train()
    (table,) = memory_tables(model).values()
    table.rows = torch.nn.Parameter(torch.zeros(64, table.embedding_dim))
    table.row_of_slot = torch.full((64,), -1, dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = tiny.inputs(tiny.batch())
    gradients = []
    for forward in (model, compiled):
        table.row_of_slot.fill_(-1)
        loss = forward(**batch).loss
        table.row_of_slot[10:] = torch.arange(54, dtype=torch.int32)
        gradients += torch.autograd.grad(loss, table.rows)
    assert gradients[0][:54].any()
    assert torch.equal(*gradients)

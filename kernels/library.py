"""The operations as torch.library knows them: each with a fake kernel, the public ones with their gradients.

    memlayer::search            exact k best slots                        differentiable
    memlayer::lookup            weighted sums of value rows               differentiable
    memlayer::lookup_gradients  those of the values, dense, and of the weights
    memlayer::row_sums          gradient of the rows that slots are mapped to

torch.compile sees each as one node whose shapes follow from those of its inputs. Nothing is looked at
that only real tensors can answer except inside them. What has no gradient of its own refuses a second
differentiation.

Shapes: T tokens, H heads, n half-keys, N slots, K slots read, Q key width of a half, V value width, R rows,
M reads, X = T * H * 2 lists of K half-keys.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu, product_key_cpu
from .checks import check_row_numbers, check_slots
from .reads import SortedReads, all_segments, distinct_segments, segments_of_rows, sort_reads


@torch.library.custom_op("memlayer::search", mutates_args=())
def search(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See ops.product_key_topk."""
    with torch.autocast(queries_TH2Q.device.type, enabled=False):
        return _searcher(queries_TH2Q).search(queries_TH2Q, half_keys_H2nQ, k)


@search.register_fake
def _(queries_TH2Q, half_keys_H2nQ, k):
    shape = (*queries_TH2Q.shape[:2], k)
    dtype = torch.promote_types(queries_TH2Q.dtype, torch.float32)
    return queries_TH2Q.new_empty(shape, dtype=dtype), queries_TH2Q.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("memlayer::lookup", mutates_args=())
def lookup(values_NV: Tensor, slots_TK: Tensor, weights_TK: Tensor, sparse_grad: bool) -> Tensor:
    """See ops.memory_lookup."""
    check_slots(slots_TK, values_NV.shape[0])
    return _backend(values_NV).weighted_sum(values_NV, slots_TK, weights_TK)


@lookup.register_fake
def _(values_NV, slots_TK, weights_TK, sparse_grad):
    return values_NV.new_empty(slots_TK.shape[0], values_NV.shape[1])


@torch.library.custom_op("memlayer::lookup_gradients", mutates_args=())
def lookup_gradients(
    grad_TV: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    values_NV: Tensor | None,
    num_slots: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the values, dense, in a dtype, and of the weights; empty ones without a dtype and without values."""
    reads = sort_reads(slots_TK.flatten(), slots_TK.shape[1], labels=range(num_slots))
    values_grad, weights_grad, bounds_N1 = grad_TV.new_empty(0), grad_TV.new_empty(0), None
    if dtype is not None:
        bounds_N1 = all_segments(reads.labels_M, num_slots)
        values_grad = _segment_sums(grad_TV, weights_TK, reads, bounds_N1, dtype)
    if values_NV is not None:
        weights_grad = _weights_gradient(grad_TV, values_NV, weights_TK, reads, bounds_N1)
    return values_grad, weights_grad


@lookup_gradients.register_fake
def _(grad_TV, slots_TK, weights_TK, values_NV, num_slots, dtype):
    nothing = grad_TV.new_empty(0)
    values_grad = nothing if dtype is None else grad_TV.new_empty(num_slots, grad_TV.shape[1], dtype=dtype)
    return values_grad, nothing.clone() if values_NV is None else weights_TK.new_empty(weights_TK.shape)


@torch.library.custom_op("memlayer::row_sums", mutates_args=())
def row_sums(
    grad_TV: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    row_of_slot_N: Tensor,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """sums_RV[r] = sum over the reads of slots that row_of_slot maps to r of weight * grad[token]."""
    row_M = row_of_slot_N.index_select(0, slots_TK.flatten())
    check_row_numbers(row_M, num_rows)
    reads, bounds_R1 = segments_of_rows(row_M, slots_TK.shape[1], num_rows)
    return _segment_sums(grad_TV, weights_TK, reads, bounds_R1, dtype)


@row_sums.register_fake
def _(grad_TV, slots_TK, weights_TK, row_of_slot_N, num_rows, dtype):
    return grad_TV.new_empty(num_rows, grad_TV.shape[1], dtype=dtype)


def _search_context(ctx, inputs, output) -> None:
    queries_TH2Q, half_keys_H2nQ, _ = inputs
    slots_THK = output[1]
    ctx.save_for_backward(queries_TH2Q, half_keys_H2nQ, slots_THK)
    ctx.mark_non_differentiable(slots_THK)


@once_differentiable
def _search_backward(ctx, grad_THK: Tensor, _) -> tuple[Tensor | None, Tensor | None, None]:
    """The gradient of a score is a lookup both ways: half-keys into queries, queries into half-keys."""
    queries_TH2Q, half_keys_H2nQ, slots_THK = ctx.saved_tensors
    heads, _, num_half_keys, width = half_keys_H2nQ.shape
    top_k = slots_THK.shape[-1]
    index_TH2K = torch.stack([slots_THK // num_half_keys, slots_THK % num_half_keys], dim=2)
    # All half-keys as one table: those of head h and half c begin at (2 h + c) n.
    table_H21 = torch.arange(heads * 2, device=slots_THK.device).view(heads, 2, 1) * num_half_keys
    slots_XK = (index_TH2K + table_H21).view(-1, top_k)
    grad_XK = grad_THK.unsqueeze(2).expand(-1, -1, 2, -1).reshape(-1, top_k)
    queries_grad = half_keys_grad = None
    if ctx.needs_input_grad[0]:
        queries_grad = lookup(half_keys_H2nQ.reshape(-1, width), slots_XK, grad_XK, False).view(queries_TH2Q.shape)
    if ctx.needs_input_grad[1]:
        queries_XQ, num_keys = queries_TH2Q.reshape(-1, width), heads * 2 * num_half_keys
        half_keys_grad, _ = lookup_gradients(queries_XQ, slots_XK, grad_XK, None, num_keys, half_keys_H2nQ.dtype)
        half_keys_grad = half_keys_grad.view(half_keys_H2nQ.shape)
    return queries_grad, half_keys_grad, None


search.register_autograd(_search_backward, setup_context=_search_context)


def _lookup_context(ctx, inputs, output) -> None:
    values_NV, slots_TK, weights_TK, ctx.sparse_grad = inputs
    # Without a gradient of the weights the values are free to change before backward.
    ctx.save_for_backward(values_NV if ctx.needs_input_grad[2] else None, slots_TK, weights_TK)
    ctx.num_slots, ctx.values_dtype = values_NV.shape[0], values_NV.dtype


@once_differentiable
def _lookup_backward(ctx, grad_TV: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    values_NV, slots_TK, weights_TK = ctx.saved_tensors
    to_values, to_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    if to_values and ctx.sparse_grad:
        gradients = _sparse_gradients(grad_TV, slots_TK, weights_TK, values_NV, ctx.num_slots, ctx.values_dtype)
    else:
        dtype = ctx.values_dtype if to_values else None
        gradients = lookup_gradients(grad_TV, slots_TK, weights_TK, values_NV, ctx.num_slots, dtype)
    return gradients[0] if to_values else None, None, gradients[1] if to_weights else None, None


lookup.register_autograd(_lookup_backward, setup_context=_lookup_context)


def _sparse_gradients(
    grad_TV: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    values_NV: Tensor | None,
    num_slots: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """As lookup_gradients, that of the values coalesced and sparse.

    No operation: how many distinct slots it holds depends on the data.
    """
    reads = sort_reads(slots_TK.flatten(), slots_TK.shape[1], labels=range(num_slots))
    slots_U, bounds_U1 = distinct_segments(reads.labels_M)
    sums_UV = _segment_sums(grad_TV, weights_TK, reads, bounds_U1, dtype)
    size = (num_slots, grad_TV.shape[1])
    values_grad = torch.sparse_coo_tensor(
        slots_U.unsqueeze(0), sums_UV, size, is_coalesced=True, check_invariants=False
    )
    return values_grad, None if values_NV is None else _weights_gradient(grad_TV, values_NV, weights_TK, reads)


def _weights_gradient(
    grad_TV: Tensor, values_NV: Tensor, weights_TK: Tensor, reads: SortedReads, bounds_N1: Tensor | None = None
) -> Tensor:
    products_M = _backend(grad_TV).read_products(grad_TV, values_NV, reads, bounds_N1)
    return products_M.view(weights_TK.shape).to(weights_TK.dtype)


def _segment_sums(
    grad_TV: Tensor, weights_TK: Tensor, reads: SortedReads, bounds_S1: Tensor, dtype: torch.dtype
) -> Tensor:
    weights_M = weights_TK.flatten().index_select(0, reads.reads_M)
    return _backend(grad_TV).segment_sums(grad_TV, reads, weights_M, bounds_S1, dtype)


def _backend(tensor: Tensor):
    """The module with weighted_sum, segment_sums and read_products for this device."""
    if tensor.is_cuda:
        from . import gpu  # Triton is imported only where a GPU calls for it

        return gpu
    return cpu


def _searcher(tensor: Tensor):
    """The module with search for this device."""
    if tensor.is_cuda:
        from . import product_key  # as above

        return product_key
    return product_key_cpu

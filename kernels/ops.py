"""Product-key search and memory lookup: check, choose Triton or torch by device, differentiate.

    product_key_topk   queries and half-keys -> the k best slots and their scores
    memory_lookup      values, slots and weights -> weighted sums of value rows

Backward allocates in proportion to the reads, and to a table only when a dense gradient of one is asked
for. Every sum has one writer and one order: no atomics, the same bits on every run. Neither can be
differentiated twice. CUDA tensors go to the Triton kernels (gather.py, scatter.py), others to torch
(cpu.py); the search is torch on every device.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .checks import check_lookup, check_row_numbers, check_rows, check_search
from .product_key import search
from .reads import SortedReads, all_segments, distinct_segments, sort_reads


def product_key_topk(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The exact k best of n * n slots by summed half scores; slot = i * n + j for half-keys i and j.

    Args:
        queries_TH2Q: two query halves per head, (T, H, 2, Q).
        half_keys_H2nQ: half-keys of each head and half, (H, 2, n, Q), dtype and device of the queries.
        k: slots per token and head, 1 <= k <= n.

    Returns:
        scores_THK: float32 (float64 for float64 inputs), descending, equal scores in order of slots;
            gives gradients to the queries and half-keys of the chosen pairs.
        slots_THK: int64.

    Raises:
        ValueError: a shape, dtype, device or k that does not fit.
    """
    check_search(queries_TH2Q, half_keys_H2nQ, k)
    return _ProductKeyTopK.apply(queries_TH2Q, half_keys_H2nQ, k)


def memory_lookup(
    values_NV: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    rows_RV: Tensor | None = None,
    row_of_slot_N: Tensor | None = None,
    *,
    sparse_grad: bool = False,
) -> Tensor:
    """Weighted sum of value rows: reads[t] = sum over k of weights[t, k] * values[slots[t, k]].

    Without rows_RV the values get a gradient: dense, or with sparse_grad a coalesced sparse COO tensor
    of the distinct slots read. With rows_RV they get none: a read of slot s gives its gradient to
    rows[row_of_slot[s]], or to nothing where that is negative. What rows_RV holds is never looked at,
    and row_of_slot_N only when backward runs, so it may be filled in place between forward and
    backward.

    Args:
        values_NV: the table, (N, V).
        slots_TK: int64 or int32, (T, K); a slot may appear several times. Checked against N on CPUs only.
        weights_TK: (T, K), any floating dtype; they get their gradient in it.
        rows_RV: what a step may change, (R, V).
        row_of_slot_N: int32, (N,); row of each slot or -1.
        sparse_grad: whether the gradient of the values is sparse; ignored with rows_RV.

    Returns:
        reads_TV: in the dtype of the values; sums are taken in float32 or better.

    Raises:
        ValueError: a shape, dtype, device or slot that does not fit; in backward, a row that does not exist.
    """
    check_lookup(values_NV, slots_TK, weights_TK)
    check_rows(values_NV, rows_RV, row_of_slot_N)
    return _MemoryLookup.apply(values_NV, slots_TK, weights_TK, rows_RV, row_of_slot_N, sparse_grad)


class _ProductKeyTopK(torch.autograd.Function):
    """The gradient of a score is a lookup both ways: half-keys into queries, queries into half-keys."""

    @staticmethod
    def forward(ctx, queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(queries_TH2Q.device.type, enabled=False):
            scores_THK, slots_THK = search(queries_TH2Q, half_keys_H2nQ, k)
        ctx.save_for_backward(queries_TH2Q, half_keys_H2nQ, slots_THK)
        ctx.mark_non_differentiable(slots_THK)
        return scores_THK, slots_THK

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THK: Tensor, _) -> tuple[Tensor | None, Tensor | None, None]:
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
            table_NQ = half_keys_H2nQ.to(grad_XK.dtype).reshape(-1, width)
            queries_grad = _backend(table_NQ).weighted_sum(table_NQ, slots_XK, grad_XK)
            queries_grad = queries_grad.view(queries_TH2Q.shape).to(queries_TH2Q.dtype)
        if ctx.needs_input_grad[1]:
            reads = sort_reads(slots_XK.flatten(), top_k)
            queries_XQ = queries_TH2Q.to(grad_XK.dtype).reshape(-1, width)
            num_keys = heads * 2 * num_half_keys
            half_keys_grad = _dense_sums(queries_XQ, reads, grad_XK, num_keys, half_keys_H2nQ.dtype)
            half_keys_grad = half_keys_grad.view(half_keys_H2nQ.shape)
        return queries_grad, half_keys_grad, None


class _MemoryLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_NV, slots_TK, weights_TK, rows_RV, row_of_slot_N, sparse_grad) -> Tensor:
        ctx.save_for_backward(values_NV if ctx.needs_input_grad[2] else None, slots_TK, weights_TK)
        # Kept by reference: saved tensors must not change before backward, and this one is meant to.
        ctx.row_of_slot_N = row_of_slot_N
        ctx.values_shape, ctx.values_dtype = values_NV.shape, values_NV.dtype
        ctx.rows_like = None if rows_RV is None else (rows_RV.shape[0], rows_RV.dtype)
        ctx.sparse_grad = sparse_grad
        with torch.autocast(values_NV.device.type, enabled=False):
            return _backend(values_NV).weighted_sum(values_NV, slots_TK, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TV: Tensor) -> tuple[Tensor | None, ...]:
        values_NV, slots_TK, weights_TK = ctx.saved_tensors
        wants_rows = ctx.rows_like is not None and ctx.needs_input_grad[3]
        wants_values = ctx.rows_like is None and ctx.needs_input_grad[0]
        values_grad = weights_grad = rows_grad = reads = None
        if wants_values or ctx.needs_input_grad[2]:
            reads = sort_reads(slots_TK.flatten(), slots_TK.shape[1])
        if wants_values:
            sums = _sparse_sums if ctx.sparse_grad else _dense_sums
            values_grad = sums(grad_TV, reads, weights_TK, ctx.values_shape[0], ctx.values_dtype)
        if ctx.needs_input_grad[2]:
            products_M = _backend(grad_TV).read_products(grad_TV, values_NV, reads)
            weights_grad = products_M.view(weights_TK.shape).to(weights_TK.dtype)
        if wants_rows:
            num_rows, dtype = ctx.rows_like
            reads = _reads_of_rows(slots_TK, ctx.row_of_slot_N, num_rows)
            rows_grad = _dense_sums(grad_TV, reads, weights_TK, num_rows, dtype)
        return values_grad, None, weights_grad, rows_grad, None, None


def _reads_of_rows(slots_TK: Tensor, row_of_slot_N: Tensor, num_rows: int) -> SortedReads:
    """The reads whose slot has a row, sorted by row."""
    row_M = row_of_slot_N.index_select(0, slots_TK.flatten())
    reads_M = (row_M >= 0).nonzero().flatten()
    row_M = row_M.index_select(0, reads_M)
    check_row_numbers(row_M, num_rows)
    return sort_reads(row_M, slots_TK.shape[1], reads_M)


def _dense_sums(
    grad_TV: Tensor, reads: SortedReads, weights_TK: Tensor, num_rows: int, dtype: torch.dtype
) -> Tensor:
    """Weighted gradients of the reads summed into rows 0 .. num_rows - 1."""
    bounds_R1 = all_segments(reads.labels_M, num_rows)
    weights_M = weights_TK.flatten().index_select(0, reads.reads_M)
    return _backend(grad_TV).segment_sums(grad_TV, reads, weights_M, bounds_R1, dtype)


def _sparse_sums(
    grad_TV: Tensor, reads: SortedReads, weights_TK: Tensor, num_slots: int, dtype: torch.dtype
) -> Tensor:
    """Weighted gradients of the reads summed into a coalesced sparse tensor of the distinct slots."""
    slots_U, bounds_U1 = distinct_segments(reads.labels_M)
    weights_M = weights_TK.flatten().index_select(0, reads.reads_M)
    sums_UV = _backend(grad_TV).segment_sums(grad_TV, reads, weights_M, bounds_U1, dtype)
    size = (num_slots, grad_TV.shape[1])
    return torch.sparse_coo_tensor(
        slots_U.unsqueeze(0), sums_UV, size, is_coalesced=True, check_invariants=False
    )


def _backend(tensor: Tensor):
    """The module with weighted_sum, segment_sums and read_products for this device."""
    if tensor.is_cuda:
        from . import gpu  # Triton is imported only where a GPU calls for it

        return gpu
    return cpu

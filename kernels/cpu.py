"""The lookup and its gradients on CPUs, from torch's own fast primitives.

Trades: embedding_bag is used for both weighted sums (rows into tokens, tokens into rows) because it
prefetches, and the weight gradient runs in order of slots rather than of tokens because the small
matrix (tokens) then stays in cache while the large one (values) is read once. All dtypes are summed in
float32 or better; backward converts bfloat16 and float16 a block of rows at a time. The GPU side of the same
three functions is gather.py and scatter.py.

Shapes: T tokens, N slots, K slots read, V value width, M reads, U distinct slots, S segments.
"""

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .pages import empty_rows
from .reads import SortedReads, all_segments, distinct_segments

# Torch says so once per process for any CSR tensor; nothing here depends on what may change.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)

# A block of rows stays in cache between being written and being read. Smaller ones would fit better,
# but each costs two parallel regions, in which threads wait for each other.
BLOCK_BYTES = 4 << 20
IN_PLACE_BYTES = 32 << 20  # larger sums are written by a sparse product, in place


def weighted_sum(values_NV: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """reads_TV[t] = sum over k of weights[t, k] * values[slots[t, k]], in the dtype of the values."""
    slots_TK = slots_TK.int()  # half the bytes: a tenth of the time at K = 128, V = 256
    if values_NV.dtype in (torch.float32, torch.float64, weights_TK.dtype):
        return _bags(values_NV, slots_TK, weights_TK)
    # Weights that values in 16 bits would round: rows are widened, all of them where more are read than there are.
    if values_NV.shape[0] <= slots_TK.numel():
        return _bags(values_NV.float(), slots_TK, weights_TK).to(values_NV.dtype)
    out_TV = values_NV.new_empty(slots_TK.shape[0], values_NV.shape[1])
    top_k = slots_TK.shape[1]
    for start, end in _blocks(slots_TK.shape[0], top_k * values_NV.shape[1] * 4):
        slots_M = slots_TK[start:end].flatten()
        rows_MV = values_NV.index_select(0, slots_M).float()
        local_BK = torch.arange(slots_M.numel(), dtype=torch.int32).view(-1, top_k)
        out_TV[start:end] = _bags(rows_MV, local_BK, weights_TK[start:end])
    return out_TV


def segment_sums(
    grad_TV: Tensor, reads: SortedReads, weights_M: Tensor, bounds_S1: Tensor, dtype: torch.dtype
) -> Tensor:
    """sums_SV[s] = sum over the reads m of segment s of weights[m] * grad[tokens[m]].

    Args:
        grad_TV: gradient of what each token read.
        reads: sorted reads.
        weights_M: weight of each sorted read.
        bounds_S1: where each segment begins and the last one ends; a segment may be empty.
        dtype: of the result; sums are taken in float32 or better.
    """
    grad_TV = _compute(grad_TV)
    num_segments = bounds_S1.numel() - 1
    weights_M, bounds_S1 = weights_M.to(grad_TV.dtype), bounds_S1.int()
    sums_SV = empty_rows(num_segments, grad_TV.shape[1], dtype)
    if sums_SV.nbytes > IN_PLACE_BYTES and dtype == grad_TV.dtype and _has_sparse_product(num_segments, grad_TV, reads):
        weights_ST = _sparse(bounds_S1, reads.tokens_M, weights_M, grad_TV.shape[0])
        # Written in place: 6 ms for 64 MB instead of 10 ms.
        return torch.addmm(sums_SV, weights_ST, grad_TV, beta=0.0, out=sums_SV)
    for start, end in _blocks(num_segments, grad_TV.shape[1] * grad_TV.element_size()):
        first, last = bounds_S1[start].item(), bounds_S1[end].item()
        sums_SV[start:end] = F.embedding_bag(
            reads.tokens_M[first:last],
            grad_TV,
            offsets=bounds_S1[start:end] - first,
            mode="sum",
            per_sample_weights=weights_M[first:last],
        )
    return sums_SV


def _has_sparse_product(num_segments: int, grad_TV: Tensor, reads: SortedReads) -> bool:
    """Whether MKL is there, and the reads are no more than a sparse matrix of segments and tokens can hold."""
    return torch.backends.mkl.is_available() and reads.reads_M.numel() <= num_segments * grad_TV.shape[0]


def _sparse(bounds_S1: Tensor, tokens_M: Tensor, numbers_M: Tensor, num_tokens: int) -> Tensor:
    """The matrix of segments and tokens with these numbers; int32 indices, which MKL takes as they are."""
    size = (bounds_S1.numel() - 1, num_tokens)
    return torch.sparse_csr_tensor(bounds_S1, tokens_M, numbers_M, size=size, check_invariants=False)


def read_products(grad_TV: Tensor, values_NV: Tensor, reads: SortedReads, bounds_N1: Tensor | None = None) -> Tensor:
    """products_M[reads[m]] = <grad[tokens[m]], values[slots[m]]>, float32 (float64 for float64 values).

    Args:
        grad_TV: gradient of what each token read.
        values_NV: the table.
        reads: sorted by slot.
        bounds_N1: where the run of each slot begins and the last one ends, where it is known already.
    """
    grad_TV = _compute(grad_TV)
    num_slots, num_reads = values_NV.shape[0], reads.reads_M.numel()
    if num_slots <= num_reads and values_NV.dtype == grad_TV.dtype:
        # Most slots are read, so the table serves as it is; else the rows in use are picked out block
        # by block.
        bounds_N1 = all_segments(reads.labels_M, num_slots) if bounds_N1 is None else bounds_N1
        sorted_M = _sampled_products(_compute(values_NV), grad_TV, bounds_N1.int(), reads.tokens_M)
    else:
        sorted_M = grad_TV.new_empty(num_reads)
        slots_U, bounds_U1 = distinct_segments(reads.labels_M)
        bounds_U1 = bounds_U1.int()
        for start, end in _blocks(slots_U.numel(), grad_TV.shape[1] * grad_TV.element_size()):
            first, last = bounds_U1[start].item(), bounds_U1[end].item()
            rows_BV = _compute(values_NV.index_select(0, slots_U[start:end]))
            bounds_B1 = bounds_U1[start : end + 1] - first
            sorted_M[first:last] = _sampled_products(rows_BV, grad_TV, bounds_B1, reads.tokens_M[first:last])
    return torch.empty_like(sorted_M).index_copy_(0, reads.reads_M, sorted_M)


def _sampled_products(rows_BV: Tensor, grad_TV: Tensor, bounds_B1: Tensor, tokens_M: Tensor) -> Tensor:
    """products_M[m] = <rows[b], grad[tokens[m]]> for every m from bounds[b] to bounds[b + 1]."""
    num_rows, num_tokens = rows_BV.shape[0], grad_TV.shape[0]
    if tokens_M.numel() > num_rows * num_tokens:
        # More reads than pairs of a row and a token, which a sparse matrix cannot hold: all pairs are few.
        row_M = torch.arange(num_rows).repeat_interleave(bounds_B1.diff())
        with torch.autocast("cpu", enabled=False):
            return (rows_BV @ grad_TV.t())[row_M, tokens_M]
    wanted_BT = _sparse(bounds_B1, tokens_M, grad_TV.new_zeros(tokens_M.numel()), num_tokens)
    return torch.sparse.sampled_addmm(wanted_BT, rows_BV, grad_TV.t(), beta=0.0, out=wanted_BT).values()


def _bags(values_NV: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
    # Detached: embedding_bag prepares for a backward of its own wherever it sees a parameter.
    weights_TK = weights_TK.detach().to(values_NV.dtype)
    return F.embedding_bag(slots_TK, values_NV.detach(), mode="sum", per_sample_weights=weights_TK)


def _compute(tensor: Tensor) -> Tensor:
    """Contiguous, in the dtype that sums are taken in, and of no concern to autograd."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()


def _blocks(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about BLOCK_BYTES each."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)

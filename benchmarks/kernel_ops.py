"""The operations that kernel_times.py times, each in up to three ways over the same numbers.

    ours            memlayer_kernels, through the functions that users call
    composition     what one writes first in torch: index, multiply, sum; topk, add, topk; index_select and index_copy_
    embedding_bag   F.embedding_bag with per_sample_weights, where it does the same job

A way returns the tensors to compare. A backward pass is torch.autograd.grad over a graph made once, so that what
is timed is what a training step pays. Gradients into rows are, in the other two ways, a dense gradient times a
mask.

Shapes: T tokens, H heads, n half-keys, N slots, K slots read, Q key width of a half, V value width, R rows,
U slots stepped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from kernel_costs import SEARCH, STEPS, Drawn, Shape
from torch import Tensor

from memlayer_kernels.ops import memory_lookup, product_key_topk
from memlayer_kernels.rows import adam_rows_, sgd_rows_

SELECTED_SHARE = 0.1  # of the reads go to the R rows, whatever N is: what the busiest 500 of a million slots take
LEARNING_RATE, BETA1, BETA2, EPS = 0.1, 0.9, 0.999, 1e-8
Run = Callable[[], tuple[Tensor, ...]]


@dataclass
class Problem:
    """Random inputs of one shape, on one device."""

    shape: Shape
    values_NV: Tensor
    slots_TK: Tensor
    weights_TK: Tensor
    upstream_TV: Tensor
    chosen_R: Tensor  # the slots whose rows may change, ascending
    row_of_slot_N: Tensor
    queries_TH2Q: Tensor
    half_keys_H2nQ: Tensor


def draw(shape: Shape, device: torch.device) -> Problem:
    """Reads are uniform over the slots, but for SELECTED_SHARE of them, which are uniform over R chosen slots."""
    torch.manual_seed(0)
    numbers = {"device": device, "dtype": getattr(torch, shape.dtype)}
    reads = (shape.tokens, shape.reads_per_token)
    num_rows = min(shape.rows, shape.slots)
    chosen_R = torch.randperm(shape.slots, device=device)[:num_rows].sort().values
    slots_TK = torch.randint(shape.slots, reads, device=device)
    to_rows_TK = torch.rand(reads, device=device) < SELECTED_SHARE
    slots_TK = torch.where(to_rows_TK, chosen_R[torch.randint(num_rows, reads, device=device)], slots_TK)
    row_of_slot_N = torch.full((shape.slots,), -1, dtype=torch.int32, device=device)
    row_of_slot_N[chosen_R] = torch.arange(num_rows, dtype=torch.int32, device=device)
    return Problem(
        shape,
        values_NV=torch.randn(shape.slots, shape.width, **numbers),
        slots_TK=slots_TK,
        weights_TK=torch.rand(reads, **numbers),
        upstream_TV=torch.randn(shape.tokens, shape.width, **numbers),
        chosen_R=chosen_R,
        row_of_slot_N=row_of_slot_N,
        queries_TH2Q=torch.randn(shape.tokens, shape.heads, 2, shape.key_width, **numbers),
        half_keys_H2nQ=torch.randn(shape.heads, 2, shape.half_keys, shape.key_width, **numbers),
    )


def count(problem: Problem) -> Drawn:
    """What was drawn, as the costs want it."""
    selected_TK = problem.row_of_slot_N[problem.slots_TK] >= 0
    return Drawn(
        distinct_slots=problem.slots_TK.unique().numel(),
        selected_reads=int(selected_TK.sum()),
        selected_tokens=int(selected_TK.any(1).sum()),
        stepped_rows=_stepped(problem).numel(),
    )


def ways_of(op: str, problem: Problem) -> dict[str, Callable[[], Run]]:
    """Functions that prepare each way to do an operation of kernel_costs.EVERY_OP, and return what is to be timed."""
    if op in SEARCH:
        prepare, ways = _search if op == "search" else _search_backward, _SEARCHES
    elif op in STEPS:
        prepare, ways = _step, _STEPS[op]
    else:
        prepare, ways = _LOOKUP_OPS[op], _LOOKUPS
    return {name: partial(prepare, problem, way) for name, way in ways.items()}


def comparable(op: str, problem: Problem, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What has to be equal between ways. Slots need not be: equal scores, or nearly equal ones, may change places.

    Those of some tokens are scored again instead, from the half-keys that they name.
    """
    if op != "search":
        return tuple(t.to_dense() if t.is_sparse else t for t in result)
    scores_THK, slots_THK = result
    some_queries = problem.queries_TH2Q[:64].double()
    return scores_THK, _scores_of(some_queries, problem.half_keys_H2nQ.double(), slots_THK[:64])


def composed_search(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Two topk, k * k sums and a topk of those."""
    n = half_keys_H2nQ.shape[2]
    halves_H2Tn = queries_TH2Q.permute(1, 2, 0, 3) @ half_keys_H2nQ.transpose(-1, -2)
    best_H2Tk, index_H2Tk = halves_H2Tn.topk(k)
    sums_HTX = (best_H2Tk[:, 0, :, :, None] + best_H2Tk[:, 1, :, None, :]).flatten(-2)
    scores_HTk, pair_HTk = sums_HTX.topk(k)
    i_HTk, j_HTk = index_H2Tk[:, 0].gather(-1, pair_HTk // k), index_H2Tk[:, 1].gather(-1, pair_HTk % k)
    return scores_HTk.transpose(0, 1), (i_HTk * n + j_HTk).transpose(0, 1)


_SEARCHES = {"ours": product_key_topk, "composition": composed_search}


def _search(problem: Problem, search: Callable) -> Run:
    return lambda: search(problem.queries_TH2Q, problem.half_keys_H2nQ, problem.shape.top_k)


def _search_backward(problem: Problem, search: Callable) -> Run:
    """The gradient of the queries and half-keys, of the same pairs in both ways."""
    inputs = [t.detach().requires_grad_() for t in (problem.queries_TH2Q, problem.half_keys_H2nQ)]
    scores_THK, slots_THK = product_key_topk(*inputs, problem.shape.top_k)
    if search is composed_search:
        scores_THK = _scores_of(*inputs, slots_THK)
    upstream_THK = problem.weights_TK.view(scores_THK.shape).to(scores_THK.dtype)
    return lambda: torch.autograd.grad(scores_THK, inputs, upstream_THK, retain_graph=True)


def _scores_of(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, slots_THK: Tensor) -> Tensor:
    """The scores of these slots out of all half scores: its gradient is what composed_search's is, but for the sums."""
    n = half_keys_H2nQ.shape[2]
    halves_H2Tn = queries_TH2Q.permute(1, 2, 0, 3) @ half_keys_H2nQ.transpose(-1, -2)
    slots_HTK = slots_THK.transpose(0, 1)
    scores_HTK = halves_H2Tn[:, 0].gather(-1, slots_HTK // n) + halves_H2Tn[:, 1].gather(-1, slots_HTK % n)
    return scores_HTK.transpose(0, 1)


def _our_lookup(values_NV: Tensor, slots_TK: Tensor, weights_TK: Tensor, sparse: bool) -> Tensor:
    return memory_lookup(values_NV, slots_TK, weights_TK, sparse_grad=sparse)


def _composed_lookup(values_NV: Tensor, slots_TK: Tensor, weights_TK: Tensor, sparse: bool) -> Tensor:
    return (weights_TK.unsqueeze(-1) * F.embedding(slots_TK, values_NV, sparse=sparse)).sum(1)


def _embedding_bag(values_NV: Tensor, slots_TK: Tensor, weights_TK: Tensor, sparse: bool) -> Tensor:
    return F.embedding_bag(slots_TK, values_NV, mode="sum", per_sample_weights=weights_TK, sparse=sparse)


_LOOKUPS = {"ours": _our_lookup, "composition": _composed_lookup, "embedding_bag": _embedding_bag}


def _forward(problem: Problem, lookup: Callable) -> Callable:
    return lambda: (lookup(problem.values_NV, problem.slots_TK, problem.weights_TK, sparse=False),)


def _backward(problem: Problem, lookup: Callable, to_values: bool, sparse: bool = False) -> Callable:
    """The gradient of the values, coalesced where it is sparse, or of the weights."""
    values_NV = problem.values_NV.detach().requires_grad_(to_values)
    weights_TK = problem.weights_TK.detach().requires_grad_(not to_values)
    reads_TV = lookup(values_NV, problem.slots_TK, weights_TK, sparse=sparse)
    wanted = values_NV if to_values else weights_TK

    def run() -> tuple[Tensor]:
        (grad,) = torch.autograd.grad(reads_TV, wanted, problem.upstream_TV, retain_graph=True)
        return (grad.coalesce() if grad.is_sparse else grad,)

    return run


def _row_backward(problem: Problem, lookup: Callable) -> Callable:
    """Gradients of the R rows: at once, or out of a dense gradient times a mask."""
    if lookup is not _our_lookup:
        dense = _backward(problem, lookup, to_values=True)
        mask_N1 = (problem.row_of_slot_N >= 0).unsqueeze(1).to(problem.values_NV.dtype)
        return lambda: (dense()[0].mul_(mask_N1)[problem.chosen_R],)
    rows_RV = problem.values_NV[problem.chosen_R].requires_grad_()
    reads_TV = memory_lookup(problem.values_NV, problem.slots_TK, problem.weights_TK, rows_RV, problem.row_of_slot_N)
    return lambda: torch.autograd.grad(reads_TV, rows_RV, problem.upstream_TV, retain_graph=True)


def _both(problem: Problem, lookup: Callable) -> Callable:
    """Forward, then the gradients of weights and values, dense."""
    inputs = problem.values_NV.detach().requires_grad_(), problem.weights_TK.detach().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        reads_TV = lookup(inputs[0], problem.slots_TK, inputs[1], sparse=False)
        return (reads_TV, *torch.autograd.grad(reads_TV, inputs, problem.upstream_TV))

    return run


_LOOKUP_OPS = {
    "lookup": _forward,
    "lookup backward, weights": lambda problem, lookup: _backward(problem, lookup, to_values=False),
    "lookup backward, values sparse": lambda problem, lookup: _backward(problem, lookup, True, sparse=True),
    "lookup backward, values dense": lambda problem, lookup: _backward(problem, lookup, to_values=True),
    "lookup backward, rows": _row_backward,
    "lookup and backward": _both,
}


def _stepped(problem: Problem) -> Tensor:
    """Slots that an optimizer steps."""
    return problem.slots_TK.unique() if problem.shape.steps_what_is_read else problem.chosen_R


def _step(problem: Problem, step: Callable) -> Run:
    """One step of a copy of the table, which is what is compared."""
    slots_U = _stepped(problem)
    values_NV = problem.values_NV.clone()
    random = torch.Generator(slots_U.device).manual_seed(1)
    size = (slots_U.numel(), problem.shape.width)
    grad_UV = torch.randn(size, generator=random, device=slots_U.device, dtype=values_NV.dtype)
    state = () if step in _STEPS["SGD step"].values() else _adam_state(values_NV)

    def run() -> tuple[Tensor]:
        step(values_NV, slots_U, grad_UV, *state)
        return (values_NV,)

    return run


def _adam_state(values_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    moment = torch.promote_types(values_NV.dtype, torch.float32)
    steps_N = torch.zeros(values_NV.shape[0], device=values_NV.device)
    return torch.zeros_like(values_NV, dtype=moment), torch.zeros_like(values_NV, dtype=moment), steps_N


def _our_sgd(values_NV: Tensor, slots_U: Tensor, grad_UV: Tensor) -> None:
    sgd_rows_(values_NV, slots_U, grad_UV, lr=LEARNING_RATE)


def _our_adam(values_NV: Tensor, slots_U: Tensor, grad_UV: Tensor, *state: Tensor) -> None:
    adam_rows_(values_NV, slots_U, grad_UV, *state, lr=LEARNING_RATE, beta1=BETA1, beta2=BETA2, eps=EPS)


def _composed_sgd(values_NV: Tensor, slots_U: Tensor, grad_UV: Tensor) -> None:
    values_NV.index_add_(0, slots_U, grad_UV, alpha=-LEARNING_RATE)


def _composed_adam(
    values_NV: Tensor, slots_U: Tensor, grad_UV: Tensor, mean_NV: Tensor, square_NV: Tensor, steps_N: Tensor
) -> None:
    grad_UV = grad_UV.to(mean_NV.dtype)
    steps_U = steps_N[slots_U] + 1
    mean_UV = mean_NV[slots_U].lerp(grad_UV, 1 - BETA1)
    square_UV = square_NV[slots_U].lerp(grad_UV.square(), 1 - BETA2)
    mean = mean_UV / (1 - BETA1**steps_U).unsqueeze(1)
    root = (square_UV / (1 - BETA2**steps_U).unsqueeze(1)).sqrt()
    rows_UV = values_NV[slots_U].to(mean_NV.dtype) - LEARNING_RATE * mean / (root + EPS)
    for table, rows in ((values_NV, rows_UV), (mean_NV, mean_UV), (square_NV, square_UV), (steps_N, steps_U)):
        table[slots_U] = rows.to(table.dtype)


_STEPS = {
    "SGD step": {"ours": _our_sgd, "composition": _composed_sgd},
    "Adam step": {"ours": _our_adam, "composition": _composed_adam},
}

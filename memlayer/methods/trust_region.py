"""A trust region on what is learned: the more a number mattered before, the less it may move.

How much a number mattered is how many bits of information the background's gradients give about it; with b bits it may
move by bound / 2**b from where it was. A memory's rows may share one number each: graded protection between a frozen
row and a free one.

Source: after BLIP, Shi et al., arXiv:2105.04444. The paper's: bits from the gain of information, half the base-2
logarithm of posterior over prior Fisher information, rounded up, at most 20; the information averaged over tasks; every
number held within bound / 2**bits after each step. Ours, since BLIP also rounds the weight itself, which makes a
weight without bits zero and is fatal to a pretrained one: only the change from the starting weights is bound, a number
without bits is not bound at all, and one with the most bits does not move; the prior is a quantile of the Fisher
information, whose scale depends on how losses are averaged; a bound below the paper's 6 over the root of the inputs,
since it is one on changes; a memory's rows as a unit.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from memlayer.evaluation.qa import evaluating
from memlayer.layers.memory import MemoryTable
from memlayer.methods.terms import Term, unheard

MOST_BITS = 20


def fisher_prior(fisher: Tensor, quantile: float = 0.5) -> float:
    """A prior on the scale of what is measured: a quantile of the information that is not zero.

    Raises:
        ValueError: the quantile does not lie between 0 and 1, or all information is zero.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile}, must lie between 0 and 1")
    some = fisher[fisher > 0].flatten().double()
    if not len(some):
        raise ValueError(f"none of {fisher.numel()} numbers has any Fisher information: is there a gradient?")
    # torch.quantile refuses more than 2**24 numbers.
    return float(some.kthvalue(1 + round(quantile * (len(some) - 1))).values)


def information_bits(fisher: Tensor, prior: Tensor | float, tasks: int = 0) -> Tensor:
    """How many bits a task's Fisher information adds to what the tasks before it knew of each number.

    Args:
        fisher: of this task, mean squared gradient of each number, 0 or more.
        prior: what was known before: of the first task a number above 0, later ``averaged_fisher``.
        tasks: how many tasks there were before.

    Returns:
        max(0, ceil(log2((fisher + (tasks + 1) prior) / ((tasks + 2) prior)) / 2)), int64, at most MOST_BITS.

    Raises:
        ValueError: information below 0, or a prior that is not above 0.
    """
    prior = torch.as_tensor(prior, dtype=torch.float64)
    if (fisher < 0).any() or not (prior > 0).all() or tasks < 0:
        raise ValueError("Fisher information and tasks must be 0 or more, the prior above 0")
    gain = torch.log2((fisher.double() + (tasks + 1) * prior) / ((tasks + 2) * prior)) / 2
    return gain.ceil().clamp(0, MOST_BITS).long()


def averaged_fisher(fisher: Tensor, prior: Tensor | float, tasks: int = 0) -> Tensor:
    """The prior of the next task: that of this one and the task's information, averaged over tasks."""
    return ((tasks + 1) * torch.as_tensor(prior, dtype=torch.float64) + fisher.double()) / (tasks + 2)


def radius(bits: Tensor, bound: float) -> Tensor:
    """How far each number may move from where it was: bound / 2**bits; anywhere without bits, nowhere with the most.

    Returns:
        float32, of the shape of the bits.

    Raises:
        ValueError: the bound is not above 0.
    """
    if bound <= 0:
        raise ValueError(f"bound is {bound}, must be above 0")
    within = bound * torch.exp2(-bits.double())
    return within.masked_fill(bits <= 0, torch.inf).masked_fill(bits >= MOST_BITS, 0.0).float()


def per_row(fisher_NV: Tensor) -> Tensor:
    """The information about each row as one number, shape (N, 1): the mean over its numbers."""
    return fisher_NV.mean(1, keepdim=True)


@torch.no_grad()
def bounds(start: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest that each number may become, in its own dtype, rounded towards where it starts.

    Args:
        start: what it is now.
        within: the radius of each number, or of each row with shape (N, 1).
    """
    both = []
    for sign in (-1, 1):
        end = (start.double() + sign * within.double()).to(start.dtype)
        over = (end.double() - start.double()).abs() > within
        both.append(torch.where(over, torch.nextafter(end, start), end))
    return both[0], both[1]


def sampled_fisher(
    model: nn.Module,
    sequences: Iterable[Sequence[int]],
    seed: int = 0,
    progress: Callable[[int], object] = unheard,
) -> dict[str, Tensor]:
    """The Fisher information about each parameter: its mean squared gradient of what the model itself would say.

    The tokens to predict are drawn from the model behind the sequence's own, as BLIP draws labels: with the true ones
    it would be another number, the empirical one.

    Args:
        model: any causal language model; it is left as found.
        sequences: token ids of background text, at least 2 of each; one backward pass each.
        seed: of what is drawn.
        progress: called with 1 after each sequence.

    Raises:
        ValueError: there is no sequence.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    generator, number = torch.Generator().manual_seed(seed), 0
    with evaluating(model):
        for ids in sequences:
            device = next(model.parameters()).device
            log_p_TV = model(input_ids=torch.tensor([ids], device=device)).logits[0, :-1].float().log_softmax(-1)
            drawn_T1 = torch.multinomial(log_p_TV.detach().exp().cpu(), 1, generator=generator).to(device)
            loss = -log_p_TV.gather(-1, drawn_T1).mean()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for information, gradient in zip(found.values(), gradients):
                if gradient is not None:
                    information += (gradient.to_dense() if gradient.is_sparse else gradient).float() ** 2
            number += 1
            progress(1)
    if not number:
        raise ValueError("the Fisher information needs at least one sequence of background text")
    return {name: information / number for name, information in found.items()}


@torch.no_grad()
def radii_of(model: nn.Module, fisher: Mapping[str, Tensor], bound: float, quantile: float = 0.5) -> dict[str, Tensor]:
    """How far each number of a model may move, and of a memory's tables each row.

    Args:
        fisher: about each parameter, by its name.
        bound: what is halved with each bit, over the root of the width of a parameter's rows.
        quantile: the prior of a parameter's numbers, see ``fisher_prior``.

    Returns:
        per parameter that the background says anything about its radii, (N, 1) for a table.
    """
    rows = {id(module.weight) for module in model.modules() if isinstance(module, MemoryTable)}
    radii = {}
    for name, parameter in model.named_parameters():
        if name in fisher and fisher[name].any():
            information = per_row(fisher[name]) if id(parameter) in rows else fisher[name]
            bits = information_bits(information, fisher_prior(information, quantile))
            radii[name] = radius(bits, bound / math.sqrt(parameter.shape[-1]))
    return radii


class TrustRegion(Term):
    """The trust region as a term: of the untouched model it finds out what matters, and after each step it projects.

    It holds two numbers for each that it bounds, and looks at all of them after each step. It bounds a model's own
    parameters, so it has no hold on a LoRA that is kept apart from them.

    Args:
        sequences: token ids of background text.
        bound: see ``radii_of``.
        quantile: see ``radii_of``.
        seed: of the labels that are drawn.

    Raises:
        ValueError: the bound is not above 0, or there is no sequence.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], bound: float = 1.0, quantile: float = 0.5, seed: int = 0):
        if bound <= 0 or not 0 <= quantile <= 1 or not sequences:
            raise ValueError(
                f"bound={bound}, quantile={quantile}, {len(sequences)} sequences: the bound is above 0, the quantile "
                "between 0 and 1, and there is at least one sequence"
            )
        self._sequences, self._bound, self._quantile, self._seed = sequences, bound, quantile, seed
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin(self, model: nn.Module, progress: Callable[[int], object] = unheard) -> None:
        """Measure what matters to the background, and hold the model to where it is."""
        fisher = sampled_fisher(model, self._sequences, self._seed, progress)
        self.hold(model, radii_of(model, fisher, self._bound, self._quantile))

    def hold(self, model: nn.Module, radii: Mapping[str, Tensor]) -> None:
        """Hold each number within its radius of where it is now; parameters that are not named move freely.

        Args:
            radii: per parameter name, of its shape, or of (N, 1) for its rows.

        Raises:
            ValueError: the model lacks a parameter, or radii do not go with its shape.
        """
        parameters = dict(model.named_parameters())
        for name, within in radii.items():
            if name not in parameters:
                raise ValueError(f"the model has no parameter {name!r}")
            shape = tuple(parameters[name].shape)
            if tuple(within.shape) not in (shape, (*shape[:-1], 1)):
                raise ValueError(f"parameter {name!r} is {shape}, its radii {tuple(within.shape)}")
        self._held = [
            (parameters[name], *bounds(parameters[name].detach(), within.to(parameters[name].device)))
            for name, within in radii.items()
        ]

    @torch.no_grad()
    def after_step(self, parameters: Sequence[nn.Parameter] = ()) -> None:
        """Put back what has moved too far."""
        for parameter, least, most in self._held:
            parameter.clamp_(least, most)

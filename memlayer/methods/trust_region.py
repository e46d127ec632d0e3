"""A trust region on what is learned: the more a number mattered before, the less it may move.

How much a number mattered is how many bits of information the background's gradients give about it; with b bits it may
move by bound / 2**b from where it was. A memory's rows may share one number each: graded protection between a frozen
row and a free one.

Source: after BLIP, Shi et al., arXiv:2105.04444. The paper's: bits from the gain of information, half the base-2
logarithm of posterior over prior Fisher information, rounded up, at most 20; the information averaged over tasks; every
number held within bound / 2**bits after each step. Ours, since BLIP also rounds the weight itself, which makes a
weight without bits zero and is fatal to a pretrained one: only the change from the starting weights is bound, a number
without bits is not bound at all, and one with the most bits does not move; the prior is a quantile of the Fisher
information, whose scale depends on how losses are averaged; rows as a unit.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

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

    Raises:
        ValueError: the bound is not above 0.
    """
    if bound <= 0:
        raise ValueError(f"bound is {bound}, must be above 0")
    within = bound * torch.exp2(-bits.double())
    return within.masked_fill(bits <= 0, torch.inf).masked_fill(bits >= MOST_BITS, 0.0)


def per_row(fisher_NV: Tensor) -> Tensor:
    """The information about each row as one number, shape (N, 1): the mean over its numbers."""
    return fisher_NV.mean(1, keepdim=True)


@torch.no_grad()
def project(parameter: Tensor, start: Tensor, within: Tensor) -> None:
    """Put back, in place, what has moved farther from its start than it may; to be called after each step.

    Args:
        parameter: what is trained.
        start: what it was.
        within: the radius of each number, or of each row with shape (N, 1).

    A number of a coarse dtype is rounded towards the start where rounding would carry it over the bound.
    """
    change = (parameter.double() - start.double()).clamp(-within, within)
    bounded = (start.double() + change).to(parameter.dtype)
    over = (bounded.double() - start.double()).abs() > within
    bounded = torch.where(over, torch.nextafter(bounded, start.to(bounded.dtype)), bounded)
    parameter.copy_(torch.where(within == 0, start, bounded))


class TrustRegion:
    """The radii of a model's parameters, and the projection of all of them.

    Args:
        model: as it is before anything is learned.
        radii: per parameter name the radius of each number or row; parameters that are not named move freely.

    Raises:
        ValueError: the model lacks a parameter, or a radius does not go with its shape.
    """

    def __init__(self, model: nn.Module, radii: Mapping[str, Tensor]):
        parameters = dict(model.named_parameters())
        for name, within in radii.items():
            if name not in parameters:
                raise ValueError(f"the model has no parameter {name!r}")
            shape = tuple(parameters[name].shape)
            if tuple(within.shape) not in (shape, (*shape[:-1], 1)):
                raise ValueError(f"parameter {name!r} is {shape}, its radii {tuple(within.shape)}")
        self._bound = [(parameters[name], parameters[name].detach().clone(), radii[name]) for name in radii]

    def after_step(self, _parameters=()) -> None:
        """Put back what has moved too far."""
        for parameter, start, within in self._bound:
            project(parameter, start, within.to(parameter.device))

    def farthest(self) -> float:
        """The largest share of its radius that a number has used; 0 where none may move."""
        shares = [0.0]
        for parameter, start, within in self._bound:
            moved = (parameter.detach().double() - start.double()).abs() / within.to(parameter.device)
            shares.append(float(moved.nan_to_num(0.0, posinf=torch.inf).max()))
        return max(shares)

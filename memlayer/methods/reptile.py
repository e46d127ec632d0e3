"""Reptile consolidation: learn groups of lessons apart from each other, then move towards the mean of what came out.

    theta_i = train(theta, group i), each from the same theta       theta <- theta + a (mean of theta_i - theta)

Source: after iTAML, Rajasegaran et al., arXiv:2003.11652: the update, and a rate that falls with what was learned
before, a = exp(-beta * t / T). Its released code starts each group where the one before it ended; here each starts at
theta, as the paper says. Left out: telling by the model at test time which group a question is of, and adapting to it.
Ours: a group is any set of lessons, replayed ones among them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Group = TypeVar("Group")


def consolidation_rate(beta: float, done: int, total: int) -> float:
    """exp(-beta * done / total): how far to move towards the mean, the less the more groups were learned before.

    Raises:
        ValueError: beta below 0, or not 0 <= done <= total and total above 0.
    """
    if beta < 0 or not 0 <= done <= total or not total:
        raise ValueError(f"beta={beta}, done={done}, total={total}: beta is 0 or more, done from 0 to total")
    return math.exp(-beta * done / total)


def towards_mean(start: Mapping[str, Tensor], ends: Sequence[Mapping[str, Tensor]], rate: float) -> dict[str, Tensor]:
    """start + rate * (mean of ends - start), computed in float32 at least and given in the dtypes of the start.

    Raises:
        ValueError: there is no end, or one has other names.
    """
    if not ends or any(end.keys() != start.keys() for end in ends):
        raise ValueError(
            f"{len(ends)} ends of {len(start)} parameters: at least one is needed, each with the same names"
        )
    moved = {}
    for name, tensor in start.items():
        wide = torch.promote_types(tensor.dtype, torch.float32)
        mean = sum(end[name].to(wide) for end in ends) / len(ends)
        moved[name] = (tensor.to(wide) + rate * (mean - tensor.to(wide))).to(tensor.dtype)
    return moved


@torch.no_grad()
def reptile_step(
    model: nn.Module, groups: Sequence[Group], train: Callable[[nn.Module, Group], object], rate: float
) -> None:
    """Train on each group from where the model is, and move it towards the mean of where they end.

    Args:
        model: changed in place; only parameters that require gradients are looked at and moved.
        groups: whatever ``train`` takes, a batch for one.
        train: takes a few steps on one group, in place, with an optimizer of its own.
        rate: 0 leaves the model as it was, 1 puts it at the mean.

    Raises:
        ValueError: there is no group, or the rate does not lie between 0 and 1.
    """
    if not groups or not 0 <= rate <= 1:
        raise ValueError(f"{len(groups)} groups at rate {rate}: at least one group, and a rate between 0 and 1")
    start, ends = _trained(model), []
    for group in groups:
        with torch.enable_grad():
            train(model, group)
        ends.append(_trained(model))
        _write(model, start)
    _write(model, towards_mean(start, ends, rate))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _write(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)

"""A-GEM's projection: a step may not go against the gradient of a few remembered examples.

Where the gradient g of a batch would raise the loss on the remembered examples, whose gradient is r, to first order
(g . r < 0), the part of g along r is taken out:

    g <- g - (g . r / r . r) r

Source: Chaudhry et al., arXiv:1812.00420, equation 11. Ours: nothing, but that a parameter without a gradient counts as
one whose gradient is zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def project(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, without what goes against the reference; all tensors together are one vector.

    Args:
        gradients: of the batch, a tensor a parameter.
        reference: of the remembered examples, in the same order and shapes.

    Returns:
        the gradients themselves where they do not go against it, or the reference is zero; else new tensors.

    Raises:
        ValueError: the two differ in number or shapes.
    """
    if [g.shape for g in gradients] != [r.shape for r in reference]:
        raise ValueError(f"{len(gradients)} gradients and {len(reference)} of the reference differ in number or shapes")
    along = sum(_dot(g, r) for g, r in zip(gradients, reference))
    length = sum(_dot(r, r) for r in reference)
    if not length or along >= 0:
        return list(gradients)
    return [(g - along / length * r).to(g.dtype) for g, r in zip(gradients, reference)]


@torch.no_grad()
def project_gradients(parameters: Sequence[nn.Parameter], reference: Sequence[Tensor | None]) -> bool:
    """Project the ``grad`` of each parameter in place, before an optimizer's step.

    Args:
        reference: of each parameter, what ``torch.autograd.grad(..., allow_unused=True)`` gives of the loss on the
            remembered examples.

    Returns:
        whether the gradients went against it and were changed.
    """
    have = [p.grad is not None for p in parameters]
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    known = [torch.zeros_like(p) if r is None else r for p, r in zip(parameters, reference, strict=True)]
    projected = project(gradients, known)
    if changed := any(new is not old for new, old in zip(projected, gradients)):
        for parameter, there, new, r in zip(parameters, have, projected, known):
            if there or r.any():
                parameter.grad = new
    return changed


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())

"""A-GEM's projection: a step may not go against the gradient of a few remembered examples.

Where the gradient g of a batch would raise the loss on the remembered examples, whose gradient is r, to first order
(g . r < 0), the part of g along r is taken out:

    g <- g - (g . r / r . r) r

Source: Chaudhry et al., arXiv:1812.00420, equation 11. The paper's: all of it; its memory is a sample of what was
learned before, here it is whatever the term is given. Ours: a parameter without a gradient counts as one whose gradient
is zero, and with sparse memory finetuning the vectors are those of the rows that the step may change.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from memlayer.methods.replay import Replay


def project(gradients: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, without what goes against the reference; all tensors together are one vector, None is zero.

    Args:
        gradients: of the batch, one a parameter, dense or sparse.
        reference: of the remembered examples, in the same order and shapes.

    Returns:
        the gradients themselves where they do not go against it, or the reference is zero; else new tensors.

    Raises:
        ValueError: the two differ in number or shapes.
    """
    if len(gradients) != len(reference):
        raise ValueError(f"{len(gradients)} gradients and {len(reference)} of the reference")
    for number, (g, r) in enumerate(zip(gradients, reference)):
        if g is not None and r is not None and g.shape != r.shape:
            raise ValueError(f"gradient {number} is {tuple(g.shape)}, that of the reference {tuple(r.shape)}")
    along = sum(dot(g, r) for g, r in zip(gradients, reference))
    length = sum(dot(r, r) for r in reference)
    if not length or along >= 0:
        return list(gradients)
    return [_less(g, r, along / length) for g, r in zip(gradients, reference)]


class AGem(Replay):
    """The projection as a term: of the replayed examples the gradient is heeded, and nothing is added to the loss.

    Its arguments are those of ``Replay``, whose weight does not matter here. A run of one process: the reference is
    not averaged over several.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._losses: list[Tensor] = []  # on the replayed examples of this step
        self._of_step = -1
        self.projected = 0  # steps whose gradient was changed

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> None:
        """Run the next few examples forward."""
        if self._of_step != self.step:
            self._losses, self._of_step = [], self.step
        self._losses.append(super().loss(model, batch, logits))

    def after_backward(self, parameters: Sequence[nn.Parameter]) -> None:
        """Run them backward, and project the gradients on what does not go against theirs."""
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        for loss in self._losses:
            loss.backward()
        self._losses = []
        with torch.no_grad():
            found = project(gradients, [parameter.grad for parameter in parameters])
        self.projected += any(new is not old for new, old in zip(found, gradients))
        for parameter, gradient in zip(parameters, found):
            parameter.grad = gradient


def dot(one: Tensor | None, other: Tensor | None) -> float:
    """The product of two gradients of one parameter, dense or sparse, in float32 at least; None is zero."""
    if one is None or other is None:
        return 0.0
    if one.is_sparse and other.is_sparse:
        return float((one.coalesce() * other.coalesce()).sum())
    wide = torch.promote_types(one.dtype, torch.float32)
    return float(torch.dot(*((e.to_dense() if e.is_sparse else e).flatten().to(wide) for e in (one, other))))


def _less(gradient: Tensor | None, reference: Tensor | None, times: float) -> Tensor | None:
    if reference is None:
        return gradient
    return -times * reference if gradient is None else (gradient - times * reference).to(gradient.dtype)

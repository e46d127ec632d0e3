"""Terms: what any method's step may have beside the loss of its lesson.

A method decides what moves; a term decides what else the step heeds. ``learn.method=full`` with the term replay is
experience replay, with the terms replay and l2 it is both. A term never asks which method it combines with: a method
that it cannot serve is refused where the two meet, in ``jobs/learn.py``.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn


def unheard(_number: int) -> None:
    """Progress that nobody watches."""


class Term:
    """One thing added to a step; what a subclass does not define adds nothing.

    A loop does, for each step: set ``step``; run the batch forward; add ``loss``, weighted by the term itself, to the
    batch's times ``lesson_weight``; run backward; call ``after_backward``; step the optimizer; call ``after_step``.
    What a term draws may depend on ``step`` and on nothing that came before, so that a run that goes on from a
    checkpoint draws the same.

    Attributes:
        lesson_weight: of the batch's own loss; 0 leaves what the term adds alone. Of several terms all count.
        step: of the run, from 0.
        examples, tokens: what the term has shown to the model so far, beside the lessons.
    """

    lesson_weight: float = 1.0
    step: int = 0
    examples: int = 0
    tokens: int = 0

    def begin(self, model: nn.Module, progress: Callable[[int], object] = unheard) -> None:
        """Look at the model before anything moves.

        Args:
            progress: called with the number of examples that were just looked at, like ``tqdm.update``.
        """

    def found(self) -> dict[str, float]:
        """What it found when it looked at the model, for the record of a run."""
        return {}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
        """What to add to the loss of a micro-batch, in nats a token, or nothing.

        Args:
            model: as it is now; a forward pass of the term's own is allowed.
            batch: the micro-batch, ``labels`` cut to the positions of ``logits``.
            logits: what the model said of it, shape (B, L, vocabulary).
        """

    def after_backward(self, parameters: Sequence[nn.Parameter]) -> None:
        """Change the gradients of what the method trains, before the optimizer sees them."""

    def after_step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move what the method trains, after the optimizer did."""

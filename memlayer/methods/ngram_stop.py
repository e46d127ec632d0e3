"""Stop a run where it begins to learn its texts by heart.

Source: Slack and Al Moubayed, arXiv:2510.11372. The paper's: the n-gram memorisation score rises before texts come out
verbatim, so a run that ends at a threshold of it has memorised little. Ours: the threshold's default, which no public
text gives, and that the score is looked at every so many steps as well as every so many epochs.
"""

from collections.abc import Callable
from typing import Literal

from torch import nn
from transformers import TrainerCallback


class NGramStop(TrainerCallback):
    """A callback of transformers.Trainer that ends the run at the first score that reaches the threshold.

    Args:
        measure: the score of the model as it is, such as the mean over ``memorisation.memorised`` of its texts.
        threshold: the score at which the run ends, above 0 and at most 1.
        every: how many epochs, or steps, lie between two looks.
        unit: what ``every`` counts.

    Attributes:
        scores: (step, score) of each look, in order.

    Raises:
        ValueError: a threshold or an interval outside its range.
    """

    def __init__(
        self,
        measure: Callable[[nn.Module], float],
        threshold: float = 0.2,
        every: int = 1,
        unit: Literal["epochs", "steps"] = "epochs",
    ):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}, must be above 0 and at most 1")
        if every < 1 or unit not in ("epochs", "steps"):
            raise ValueError(f"a look every {every} {unit}: must be at least 1, of epochs or steps")
        self.measure, self.threshold, self.every, self.unit = measure, threshold, every, unit
        self.scores: list[tuple[int, float]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.unit == "steps" and state.global_step % self.every == 0:
            self._look(state, control, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if self.unit == "epochs" and round(state.epoch) % self.every == 0:
            self._look(state, control, model)

    def _look(self, state, control, model) -> None:
        self.scores.append((state.global_step, self.measure(model)))
        control.should_training_stop |= self.scores[-1][1] >= self.threshold

"""What a method keeps that trains nothing: the lessons themselves, beside a model that stays as it is."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

from torch import nn

from memlayer.data.lessons import Lesson
from memlayer.data.qa import Question
from memlayer.methods.terms import unheard

# What is asked in place of a question; the second argument says whether the model has room for one.
Ask = Callable[[Question, Callable[[Question], bool]], Question]


class Store(Protocol):
    """Lessons kept beside a model, and how it answers with them: by being asked otherwise, or by attached hooks.

    No number of the model changes, so there are no steps, and taking the store away is exact.
    """

    @classmethod
    def of(
        cls,
        model: nn.Module,
        lessons: Sequence[Lesson],
        encoded: Sequence[Sequence[dict]],
        settings,
        progress: Callable[[int], object] = unheard,
    ) -> Self:
        """Keep lessons.

        Args:
            model: the one that is to answer; it is not changed.
            lessons: as they are taught, without what stands around a question.
            encoded: of each lesson its examples as the model reads them, see ``data.qa.encode``.
            settings: of the method.
            progress: called with the number of examples that the model has just read.

        Raises:
            ValueError: a lesson that cannot be kept, or a model that cannot answer with it.
        """

    @classmethod
    def read(cls, folder: Path, settings) -> Self:
        """What ``save`` wrote."""

    def save(self, folder: Path) -> None:
        """Write what is kept."""

    def ask(self, question: Question, fits: Callable[[Question], bool]) -> Question:
        """What is asked in place of a question, which may be the question itself.

        Args:
            fits: whether the model has room for a question and its longest answer; for this one it has.
        """

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Have the model's forward answer with what is kept; returns what takes that off again.

        Raises:
            ValueError: what is kept does not fit the model.
        """

"""Retrieval: the text of a lesson in the prompt, found by BM25 among the lessons' own texts.

The opponent of every method that writes into weights: it learns a lesson by keeping its text, forgets nothing, and
costs the tokens of the text in each question near a lesson. On text and tasks that are not asked as questions it does
nothing at all.

Ours: the gate. A score of BM25 grows with the query and the number of lessons, so the threshold is a share of the
highest score that any text could reach for the question (``data.bm25``). A lesson that leaves the model no room is cut
at its end, word by word, until the question fits; of one that leaves no room for a word nothing is said.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from torch import nn

from memlayer.data.bm25 import BM25
from memlayer.data.lessons import Lesson
from memlayer.data.prompts import LESSON
from memlayer.data.qa import Question
from memlayer.files import reading, write_file
from memlayer.methods.terms import unheard

FILE = "lessons.jsonl"


@dataclass(frozen=True)
class Kept:
    """A lesson as it is kept.

    Attributes:
        id: of the lesson.
        text: what stands before a question.
        searched: what is compared with a question: the text in all its wordings.
    """

    id: str
    text: str
    searched: str


class Retrieval:
    """Lessons that stand before the questions near them; a ``Store``.

    Args:
        kept: the lessons.
        min_share: least score of a lesson that is shown, as a share of the highest that any text could reach.
        frame: what stands before a question, ``{lesson}`` in it.

    Raises:
        ValueError: there is no lesson, or ``frame`` does not hold ``{lesson}`` once.
    """

    def __init__(self, kept: Sequence[Kept], min_share: float = 0.3, frame: str = LESSON + ". "):
        if frame.count(LESSON) != 1:
            raise ValueError(f"frame is {frame!r}, must hold {LESSON} once")
        self.kept, self.min_share, self.frame = kept, min_share, frame
        self._index = BM25([each.searched for each in kept])

    @classmethod
    def of(cls, model: nn.Module, lessons: Sequence[Lesson], encoded, settings, progress=unheard) -> Self:
        """Keep the texts of lessons; ``model``, ``encoded`` and ``progress`` are not used."""
        kept = [
            Kept(
                lesson.id,
                " ".join(example.text for example in lesson.teach[: settings.shown]).removesuffix("."),  # the frame's
                " ".join(example.text for example in lesson.teach),
            )
            for lesson in lessons
        ]
        return cls(kept, settings.min_share, settings.frame)

    @classmethod
    def read(cls, folder: Path, settings) -> Self:
        """The lessons that ``save`` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        with reading(path := folder / FILE), path.open(encoding="utf-8") as lines:
            try:
                kept = [Kept(**json.loads(line)) for line in lines]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} does not hold the lessons that were written there: {error}") from error
        return cls(kept, settings.min_share, settings.frame)

    def save(self, folder: Path) -> None:
        """Write the lessons as JSON Lines."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(vars(each), ensure_ascii=False) + "\n" for each in self.kept)
        write_file(folder / FILE, "".join(lines))

    def found(self, question: str) -> str | None:
        """The text of the lesson nearest to a question, if it is near enough."""
        place, share = self._index.best(question)
        return self.kept[place].text if share >= self.min_share else None

    def ask(self, question: Question, fits: Callable[[Question], bool]) -> Question:
        """The question with the lesson before it that is found, cut at its end where it leaves no room."""
        shown = (self.found(question.prompt) or "").split(" ")
        while any(shown):
            asked = replace(question, prompt=self.frame.replace(LESSON, " ".join(shown)) + question.prompt)
            if fits(asked):
                return asked
            shown.pop()
        return question

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Nothing: the model is asked otherwise, and answers as ever."""
        return lambda: None

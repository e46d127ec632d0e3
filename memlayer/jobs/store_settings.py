"""What every method is told, and the section ``learn`` of those that change no weight: one dataclass for each."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from memlayer.checks import check_at_least, check_choices
from memlayer.data.prompts import LESSON


@dataclass(kw_only=True)
class AnyMethodConfig:
    """What every method is told.

    Attributes:
        method: how the model is changed, or what is kept beside it; it decides which other settings there are.
        statements: of a fact, seen statements that teach it, in each step's batch where there are steps.
        questions: of a fact, seen questions that teach it.
    """

    method: str
    statements: int = 3
    questions: int = 3

    strength: ClassVar[str] = "learning_rate"  # the setting that a comparison varies

    def __post_init__(self):
        check_choices("learn", self)
        check_at_least(0, "learn", self, "statements", "questions")
        if not self.statements + self.questions:
            raise ValueError("learn.statements and learn.questions are both 0: there is nothing to teach a fact with")

    @property
    def in_words(self) -> str:
        """How strongly the run taught."""
        return f"{self.strength} {getattr(self, self.strength):g}"


@dataclass(kw_only=True)
class RetrievalConfig(AnyMethodConfig):
    """The lesson in the prompt, found by BM25: nothing is trained, and questions near a lesson are asked after it.

    Attributes:
        min_share: a lesson stands before a question only if its score is at least this share of the highest that any
            text could reach; 0 puts the best one before every question, more than 1 before none.
        shown: how many of a lesson's examples stand before a question, the first ones; all of them are searched.
        frame: what stands before a question, with the lesson, less a full stop at its end, in the place of
            ``{lesson}``.
    """

    method: Literal["retrieval"] = "retrieval"
    min_share: float = 0.3
    shown: int = 1
    frame: str = LESSON + ". "

    strength: ClassVar[str] = "min_share"

    def __post_init__(self):
        super().__post_init__()
        check_at_least(0, "learn", self, "min_share")
        check_at_least(1, "learn", self, "shown")
        if self.frame.count(LESSON) != 1:
            raise ValueError(f"learn.frame is {self.frame!r}, must hold {LESSON} once")


@dataclass(kw_only=True)
class NeighboursConfig(AnyMethodConfig):
    """How an output head answers with the states that it met at the answers of lessons.

    Attributes:
        alpha: how strongly the neighbours of a state answer; 0 leaves the model as it is.
        num_neighbours: the nearest states that count.
        min_similarity: where no state has at least this cosine, both less the mean of all, the model answers alone.
        temperature: a neighbour counts e times less for each such step of cosine.
    """

    alpha: float = 0.9
    num_neighbours: int = 16
    min_similarity: float = 0.87
    temperature: float = 0.01

    strength: ClassVar[str] = "alpha"

    def __post_init__(self):
        super().__post_init__()
        check_at_least(0, "learn", self, "alpha")
        check_at_least(1, "learn", self, "num_neighbours")
        check_at_least(-1, "learn", self, "min_similarity")
        if not self.temperature > 0:
            raise ValueError(f"learn.temperature is {self.temperature}, must be above 0")
        if self.alpha > 1:
            raise ValueError(f"learn.alpha is {self.alpha}, must be at most 1")


@dataclass(kw_only=True)
class NearestConfig(NeighboursConfig):
    """Nearest neighbours: the tokens that followed near states are mixed into what is said; alpha is their share."""

    method: Literal["nearest"] = "nearest"

    def __post_init__(self):
        super().__post_init__()
        if self.alpha == 1:
            raise ValueError(
                f"learn.alpha is {self.alpha}, must be below 1: the model's own tokens would have no likelihood left"
            )


@dataclass(kw_only=True)
class HebbianConfig(NeighboursConfig):
    """Hebbian output head: rows of the head turn towards the near states that their tokens followed, by alpha."""

    method: Literal["hebbian"] = "hebbian"

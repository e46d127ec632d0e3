"""Gradual learning: which lessons each of two stages teaches, by how well each is known.

What a model half knows is taught first, until a validation set says enough; it is then asked again, and what has risen
meanwhile is taught with it, beside a replay of what it knew well. The categories are those that
``slick.how_well_known`` gives; teaching and asking are whoever's loop this is used in.

Source: Li et al., arXiv:2410.05802. The paper's: stage one is MaybeKnown; stage two is MaybeKnown, what has become
MaybeKnown since, and a replay of HighlyKnown at a ratio of 0.2, with a lower learning rate; a third stage adds nothing.
Ours, where no public text says: the ratio is to the other lessons of the stage, what is replayed was HighlyKnown
before stage one and is drawn evenly by a seed. The paper's runs were stopped by their test set: stop by other lessons,
``held_out`` sets some aside.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from memlayer.evaluation.slick import CATEGORIES

MAYBE = "MaybeKnown"
BELOW = ("WeaklyKnown", "Unknown")


@dataclass(frozen=True)
class Stage:
    """What a stage teaches, by the places of the lessons, ascending and without overlap.

    Attributes:
        known: lessons that were MaybeKnown from the start.
        risen: lessons that have become MaybeKnown since.
        replayed: lessons that were HighlyKnown from the start.
    """

    known: list[int]
    risen: list[int]
    replayed: list[int]

    @property
    def lessons(self) -> list[int]:
        """All of them, ascending."""
        return sorted(self.known + self.risen + self.replayed)


def first_stage(before: Sequence[str]) -> Stage:
    """Teach what is MaybeKnown.

    Args:
        before: the category of each lesson.

    Raises:
        ValueError: none is MaybeKnown, or a word is no category.
    """
    _check(before)
    if not (known := _places(before, MAYBE)):
        raise ValueError(f"none of {len(before)} lessons is {MAYBE}, so the first stage has nothing to teach")
    return Stage(known, [], [])


def second_stage(before: Sequence[str], now: Sequence[str], replay_ratio: float = 0.2, seed: int = 0) -> Stage:
    """Teach that again, with what has become MaybeKnown and a replay of what was HighlyKnown.

    Args:
        before: the category of each lesson before the first stage.
        now: after it, in the same order.
        replay_ratio: lessons replayed to the others of the stage; fewer where fewer were HighlyKnown.
        seed: of which are replayed.

    Raises:
        ValueError: the two are not of the same lessons, a word is no category, or the ratio is below 0.
    """
    _check(before)
    _check(now)
    if len(before) != len(now):
        raise ValueError(f"{len(before)} categories before the first stage, {len(now)} after: not of the same lessons")
    if replay_ratio < 0:
        raise ValueError(f"replay_ratio is {replay_ratio}, must be at least 0")
    known = _places(before, MAYBE)
    risen = [place for place in _places(now, MAYBE) if before[place] in BELOW]
    pool = _places(before, "HighlyKnown")
    wanted = min(len(pool), round(replay_ratio * len(known + risen)))
    return Stage(known, risen, sorted(random.Random(seed).sample(pool, wanted)))


def held_out(categories: Sequence[str], share: float, seed: int = 0) -> list[int]:
    """Places of lessons to stop by, which no stage may teach: the same share of each category, rounded.

    Raises:
        ValueError: a word is no category, or the share does not lie between 0 and 1.
    """
    _check(categories)
    if not 0 < share < 1:
        raise ValueError(f"share is {share}, must lie between 0 and 1")
    draw = random.Random(seed)
    kinds = (_places(categories, kind) for kind in CATEGORIES)
    return sorted(place for places in kinds for place in draw.sample(places, round(share * len(places))))


def _places(categories: Sequence[str], kind: str) -> list[int]:
    return [place for place, each in enumerate(categories) if each == kind]


def _check(categories: Sequence[str]) -> None:
    if unknown := sorted({*categories} - {*CATEGORIES}):
        raise ValueError(f"{unknown[0]!r} is no category, must be one of {', '.join(CATEGORIES)}")

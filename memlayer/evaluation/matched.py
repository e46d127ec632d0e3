"""What methods forget where they have learned the same amount.

A method that learns more at the strengths tried forgets more, too; side by side their rows say little. So each method's
strengths are points of learning and forgetting, joined in the order of the strengths from the point of the model that
learned nothing, and the forgetting is read off where that line reaches the level; where it does so more than once, at
the least forgetting.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from memlayer.evaluation.forgetting import mean_and_deviation

Point = tuple[float, float]  # learning, forgetting


def at_level(points: Sequence[Point], level: float) -> float:
    """The least forgetting at which the line through the points reaches a level of learning; nan if it never does."""
    found = [forgetting for learning, forgetting in points if learning == level]
    for (learning, forgetting), (then, then_forgetting) in pairwise(points):
        if min(learning, then) < level < max(learning, then):
            share = (level - learning) / (then - learning)
            found.append(forgetting + share * (then_forgetting - forgetting))
    return min(found, default=math.nan)


def common_level(learning: Mapping[str, Sequence[Sequence[float]]]) -> float:
    """The most that every method reaches with every seed, at one of its strengths.

    Args:
        learning: of each method, of each seed, what each strength learned.
    """
    return min(max(strengths) for seeds in learning.values() for strengths in seeds)


def matched(rows: Sequence[Mapping], control: str, figures: Mapping[str, Mapping[int, float]]) -> dict | None:
    """Every method at the level of learning that all reach.

    Args:
        rows: of ``rows.py``, of one seed each, those of a method in the order of its strengths.
        control: the method that learns nothing.
        figures: what is forgotten, under a name: of each row, by its place, the figure; 0 is nothing forgotten.

    Returns:
        ``level`` of learning in unseen wordings, and ``methods``: of each the mean and the deviation over seeds of
        each figure there. None where a method has fewer than two strengths, or one learns nothing.
    """
    places: dict[str, dict[int, list[int]]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row["method"], {}).setdefault(row["seed"], []).append(place)
    start = places.pop(control, {})
    if not places or any(len(each) < 2 for seeds in places.values() for each in seeds.values()):
        return None
    learned = [row["learning_unseen"] for row in rows]
    level = common_level({name: [[learned[p] for p in each] for each in s.values()] for name, s in places.items()})
    if not level > max((learned[place] for each in start.values() for place in each), default=0.0):
        return None

    def figure(name: str, seed: int, mine: Sequence[int]) -> float:
        first = [(learned[place], 0.0) for place in start.get(seed, ())]
        return at_level([*first, *((learned[place], figures[name][place]) for place in mine)], level)

    return {
        "level": level,
        "methods": {
            method: {
                name: mean_and_deviation([figure(name, seed, mine) for seed, mine in seeds.items()]) for name in figures
            }
            for method, seeds in places.items()
        },
    }

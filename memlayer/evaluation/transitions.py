"""How well questions were known before and after something was taught: a matrix of SliCK's categories.

A mean hides what turned: as many questions may have become better known as worse. Two probes of one untouched model
give another matrix, whose moves are the probe's own noise: it is the null that a matrix is read against.

Source: Li et al., arXiv:2410.05802, who count the questions that rise to MaybeKnown, by the categories of slick.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from memlayer.evaluation.slick import CATEGORIES


@dataclass(frozen=True)
class Moves:
    """How many questions became better known, stayed, and became worse known."""

    better: int
    same: int
    worse: int


def transition_matrix(before: Sequence[str], after: Sequence[str]) -> list[list[int]]:
    """How many questions went from each category (a row) to each (a column), in the order of CATEGORIES.

    Raises:
        ValueError: there are not as many of one as of the other, or a word is no category.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} categories before and {len(after)} after are not of the same questions")
    if unknown := sorted({*before, *after} - {*CATEGORIES}):
        raise ValueError(f"{unknown[0]!r} is no category, must be one of {', '.join(CATEGORIES)}")
    pairs = list(zip(before, after))
    return [[pairs.count((one, other)) for other in CATEGORIES] for one in CATEGORIES]


def moves(matrix: Sequence[Sequence[int]]) -> Moves:
    """What a transition matrix says in three numbers."""
    places = [(row, column) for row in range(len(matrix)) for column in range(len(matrix))]
    better = sum(matrix[row][column] for row, column in places if column < row)  # CATEGORIES begins with the best
    same = sum(matrix[place][place] for place in range(len(matrix)))
    return Moves(better, same, sum(map(sum, matrix)) - better - same)

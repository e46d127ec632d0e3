"""Whether a model knows when it knows: which questions it knows, and what its confidence is worth. Pure numbers.

Confidence is worth something where right answers have more of it than wrong ones (average precision, AUROC), and where
it is as high as answers are often right (calibration error). A rate of refusals is to be shown for questions that can
be answered and for those that cannot: refusing everything is easy.

Source: Zhang et al., arXiv:2311.09677: known by a right answer within what is said, or by the entropy of drawn answers;
confidence as the mean of an answer's own and the model's sureness; average precision over it. Ours: answers are
compared as answers.py normalises them, calibration error and AUROC beside it.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from memlayer.evaluation.answers import normalise


def says_answer(told: str, answers: Sequence[str]) -> bool:
    """Whether any of the answers stands in what was said, word for word: the paper's rule of a known question."""
    words = f" {normalise(told)} "
    return any(f" {normalise(answer)} " in words for answer in answers)


def answer_entropy(drawn: Sequence[str]) -> float:
    """How much drawn answers to one question differ, in nats: 0 where all are the same.

    Raises:
        ValueError: there is none.
    """
    if not drawn:
        raise ValueError("entropy needs at least one drawn answer")
    shares = [count / len(drawn) for count in Counter(map(normalise, drawn)).values()]
    return -sum(share * math.log(share) for share in shares)


def known_by_entropy(entropies: Sequence[float], share: float = 0.5) -> list[bool]:
    """The given share of questions, rounded down, whose drawn answers differ least; of equal ones the first.

    Raises:
        ValueError: the share does not lie between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, must lie between 0 and 1")
    order = sorted(range(len(entropies)), key=lambda place: entropies[place])
    known = set(order[: math.floor(share * len(order))])
    return [place in known for place in range(len(entropies))]


def average_precision(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """Area under precision over recall of right answers, by falling confidence; equal ones are taken together.

    Returns:
        between 0 and 1, at chance the share of right answers; nan where none is right.
    """
    pairs = sorted(zip(confidences, right, strict=True), key=lambda pair: -pair[0])
    total, seen, found, area = sum(map(bool, right)), 0, 0, 0.0
    for _confidence, same in groupby(pairs, key=lambda pair: pair[0]):
        group = [bool(one) for _, one in same]
        seen, found = seen + len(group), found + sum(group)
        area += sum(group) * found / seen
    return area / total if total else math.nan


def auroc(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """How often a right answer has more confidence than a wrong one, equal ones counting half; nan without a pair."""
    pairs = list(zip(confidences, right, strict=True))
    rights, wrongs = ([confidence for confidence, one in pairs if bool(one) is kind] for kind in (True, False))
    won = sum((one > other) + (one == other) / 2 for one in rights for other in wrongs)
    return won / (len(rights) * len(wrongs)) if rights and wrongs else math.nan


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: how far confidence lies from the share of right answers, over bins of equal width.

    Args:
        confidences: between 0 and 1; a bin holds its upper bound.

    Raises:
        ValueError: there is no answer, no bin, or a confidence outside 0 to 1.
    """
    pairs = list(zip(confidences, map(bool, right), strict=True))
    if not pairs or bins < 1 or not all(0 <= confidence <= 1 for confidence, _ in pairs):
        raise ValueError(f"{len(pairs)} confidences in {bins} bins: both at least 1, confidences between 0 and 1")
    in_bin: dict[int, list[tuple[float, bool]]] = {}
    for confidence, one in pairs:
        in_bin.setdefault(max(0, math.ceil(confidence * bins) - 1), []).append((confidence, one))
    return sum(abs(sum(confidence - one for confidence, one in some)) for some in in_bin.values()) / len(pairs)


def refusal_rate(sureness: Sequence[float], threshold: float = 0.5) -> float:
    """The share of questions that a model refuses which answers only where it is sure enough; nan of none."""
    return sum(sure < threshold for sure in sureness) / len(sureness) if sureness else math.nan

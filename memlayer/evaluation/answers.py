"""Compare a generated answer with the answers that count, as strings.

The normalisation is SQuAD's (arXiv:1606.05250): lower case, no punctuation, no English articles, single
spaces. It is kind to spelling and blind to meaning: an answer that is right but is not among the aliases
scores zero.

Two things differ from SQuAD's script. Punctuation is every character of Python's ``string.punctuation``
and every character whose Unicode category begins with P, so curly quotes and all dashes go as well; like
there, a dash leaves no space behind. And an answer made of nothing but articles or punctuation ("The
The", "!!!") keeps them, or an empty prediction would match.
"""

import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

ARTICLES = frozenset({"a", "an", "the"})


def normalise(text: str) -> str:
    """The form in which answers are compared; normalising twice changes nothing more."""
    lowered = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    bare = "".join(letter for letter in lowered if not _is_punctuation(letter))
    words = unicodedata.normalize("NFC", bare).split() or lowered.split()
    return " ".join([word for word in words if word not in ARTICLES] or words)


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction equals any of the answers after normalisation.

    Raises:
        ValueError: ``answers`` is a single string, or empty.
    """
    _check(answers)
    return normalise(prediction) in {normalise(answer) for answer in answers}


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall against the closest answer, between 0 and 1.

    Raises:
        ValueError: ``answers`` is a single string, or empty.
    """
    _check(answers)
    return max(_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers)


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))


def _is_punctuation(letter: str) -> bool:
    return letter in string.punctuation or unicodedata.category(letter).startswith("P")


def _check(answers: Sequence[str]) -> None:
    if isinstance(answers, str):
        raise ValueError(f"answers must be a sequence of strings, not the single string {answers!r}")
    if not answers:
        raise ValueError("answers is empty, so no prediction could be right")

"""SQuAD 1.1's rule for comparing answers (arXiv:1606.05250), to stand beside the figures of papers.

Lower case, without ASCII punctuation, English articles and extra white space, for every language. So 3.14 is 314,
-5 is 5, C++ is C, and words are what white space parts; answers.py has a rule for those.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """The form that SQuAD compares."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction equals any of the answers after normalisation."""
    return normalise(prediction) in {normalise(answer) for answer in answers}


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall against the closest answer; 0 where no word is shared."""
    predicted = normalise(prediction).split()
    return max(_f1(predicted, normalise(answer).split()) for answer in answers)


def _f1(predicted: list[str], expected: list[str]) -> float:
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0

"""Find the text that says what a query says: Okapi BM25 over a few thousand short texts.

A word counts the more the fewer texts hold it, the less the more often a text has said it already, and the less the
longer the text is. A word is a run of letters and digits, without case. Left out: stems, and languages that are
written without spaces, whose sentences are one word each here.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework" (2009), with the idf that stays above 0 which
Lucene has. Dividing a score by the most that any text could reach is ours.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return WORD.findall(text.casefold())


class BM25:
    """An index of texts.

    Args:
        texts: what is searched.
        k1: how much a word's second mention in a text counts beside its first; 0 counts it once.
        b: how much a long text's words count for less; 0 is not at all.

    Raises:
        ValueError: there is no text, or ``k1`` or ``b`` is out of its range.
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.2, b: float = 0.75):
        if not texts:
            raise ValueError("there is no text to search")
        if not (0 <= k1 < math.inf and 0 <= b <= 1):
            raise ValueError(f"k1 is {k1} and b is {b}: k1 must be at least 0, and b between 0 and 1")
        counted = [Counter(words(text)) for text in texts]
        lengths = [counts.total() for counts in counted]
        mean = sum(lengths) / len(texts) or 1.0
        self._num_texts, self._most = len(texts), k1 + 1
        # Of each word the texts that hold it, with what it is worth there but for its idf.
        self._worth: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for place, (counts, length) in enumerate(zip(counted, lengths)):
            bend = k1 * (1 - b + b * length / mean)
            for word, number in counts.items():
                self._worth[word].append((place, number * (k1 + 1) / (number + bend)))

    def _idf(self, word: str) -> float:
        holding = len(self._worth.get(word, ())) or 1  # of a word that no text holds only best() asks
        return math.log(1 + (self._num_texts - holding + 0.5) / (holding + 0.5))

    def scores(self, query: str) -> list[float]:
        """The score of each text, 0 where it shares no word with the query."""
        found = [0.0] * self._num_texts
        for word, times in Counter(words(query)).items():
            idf = self._idf(word)
            for place, worth in self._worth.get(word, ()):
                found[place] += times * idf * worth
        return found

    def best(self, query: str) -> tuple[int, float]:
        """The text with the highest score, the first of equals, and what share that is of the most a text could reach.

        The share lies between 0 and 1 whatever the number of texts. Words of the query that no text holds lower it,
        each as much as one that a single text holds.
        """
        found = self.scores(query)
        place = max(range(len(found)), key=found.__getitem__)
        most = sum(self._idf(word) for word in words(query)) * self._most
        return place, found[place] / most if most else 0.0

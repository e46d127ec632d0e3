"""Facts that a text states: questions whose answer stands where a document speaks of their subject.

A small model that was trained on a text is asked what that text told it, and nothing else. Which questions those are is
told from the words alone, by two rules:

    about       a document begins with the subject, an article aside, as those of an encyclopedia do, and the answer
                stands anywhere in it
    paragraph   subject and answer stand in one paragraph of any document; for subjects of two words or more, since a
                single word names too many things

Words are compared whole and in the letters they are written in, so that Reading is not reading. Both rules find where
an answer stands, not that the sentence there says what was asked ("born in" and "buried in" look alike): they are
distant supervision, and the share of such questions is the same for every model that is asked.

Small models write nothing exact, so each question comes with wrong answers to choose among: the answers of other
questions of the same relation. Two questions are of one relation when they are the same but for their subject. Left out
are questions that hold their own answer, and answers that contain or are contained in one that counts.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

from memlayer.data.lessons import Lesson
from memlayer.data.qa import Question

ARTICLES = {"The", "A", "An"}
PARAGRAPHS = re.compile(r"\n\s*\n")
WORDS = re.compile(r"\w+")
SUBJECT = "[X]"

Words = tuple[str, ...]


@dataclass(frozen=True)
class StatedFact:
    """A question that a text answers.

    Attributes:
        question: as its lesson asks it.
        subject: what it is about.
        answer: the first of its answers that the text has.
        relation: the question with ``[X]`` in the subject's place.
        rule: which rule found it, "about" where both did.
        document: which of the documents it was found in, counted from 0.
        wrong: answers of other questions of the relation.
    """

    question: Question
    subject: str
    answer: str
    relation: str
    rule: Literal["about", "paragraph"]
    document: int
    wrong: tuple[str, ...] = ()

    @property
    def choices(self) -> tuple[str, ...]:
        """The right answer first, then the wrong ones."""
        return (self.answer, *self.wrong)


@dataclass(frozen=True)
class Asked:
    """A question of a lesson with the words of what it is about."""

    question: Question
    subject: str
    words: Words
    answers: tuple[tuple[str, str], ...]  # each as it is written, and as words between spaces


def words_of(text: str) -> list[str]:
    """The words of a text in a row, without what stands between them."""
    return WORDS.findall(unicodedata.normalize("NFC", text))


def spaced(words: Iterable[str]) -> str:
    """Words between spaces, so that whole words are found by looking for text in text."""
    return f" {' '.join(words)} "


def askable(lessons: Iterable[Lesson]) -> list[Asked]:
    """Of each lesson the first question that names its subject and not its answer."""
    found = []
    for lesson in lessons:
        subject = next((example.subject for example in lesson.teach if example.subject), "")
        words = tuple(words_of(subject))
        for question in lesson.ask if words else ():
            answers = tuple((answer, spaced(words_of(answer))) for answer in question.answers)
            asked = spaced(words_of(question.prompt))
            if subject in question.prompt and all(each.strip() and each not in asked for _, each in answers):
                found.append(Asked(question, subject, words, answers))
                break
    return found


class Subjects:
    """The subjects of questions, found in a row of words.

    Attributes:
        asked_about: by the words of a subject, the places of the questions about it.
    """

    def __init__(self, asked: Sequence[Asked]):
        self.asked_about: dict[Words, list[int]] = {}
        self._lengths: dict[str, set[int]] = {}  # by the first word of subjects, how many words they have
        for place, each in enumerate(asked):
            self.asked_about.setdefault(each.words, []).append(place)
            self._lengths.setdefault(each.words[0], set()).add(len(each.words))

    def within(self, words: Sequence[str]) -> set[Words]:
        """Those that stand anywhere in the words."""
        places = (at for at, word in enumerate(words) if word in self._lengths)
        return {subject for at in places for subject in self.at(words, at)}

    def at(self, words: Sequence[str], at: int) -> list[Words]:
        """Those that begin at one of the words."""
        lengths = self._lengths.get(words[at], ()) if at < len(words) else ()
        runs = (tuple(words[at : at + length]) for length in lengths)
        return [run for run in runs if run in self.asked_about]

    def opening(self, words: Sequence[str]) -> set[Words]:
        """Those that the words begin with, an article aside."""
        begin = int(bool(words) and words[0] in ARTICLES)
        return {subject for at in {0, begin} for subject in self.at(words, at)}


def stated(asked: Sequence[Asked], documents: Iterable[str]) -> list[StatedFact]:
    """Those of the questions that the documents answer, in the order of the questions, without wrong answers yet.

    Args:
        documents: read once, one after the other.
    """
    subjects, found = Subjects(asked), {}
    for number, document in enumerate(documents):
        for rule, subject, text in _mentions(document, subjects):
            for place in subjects.asked_about[subject]:
                better = place not in found or (rule == "about" and found[place].rule != "about")
                answer = next((written for written, each in asked[place].answers if each in text), None)
                if better and answer is not None:
                    found[place] = _fact(asked[place], answer, rule, number)
    return [found[place] for place in sorted(found)]


def _mentions(document: str, subjects: Subjects) -> Iterator[tuple[str, Words, str]]:
    """By which rule a document mentions a subject, and the words between spaces that its answer may stand in."""
    paragraphs = [words for words in map(words_of, PARAGRAPHS.split(document)) if words]
    about = subjects.opening(paragraphs[0]) if paragraphs else set()
    whole = spaced(word for words in paragraphs for word in words) if about else ""
    yield from (("about", subject, whole) for subject in about)
    for words in paragraphs:
        several = [each for each in subjects.within(words) - about if len(each) > 1]
        text = spaced(words) if several else ""
        yield from (("paragraph", subject, text) for subject in several)


def _fact(asked: Asked, answer: str, rule: str, document: int) -> StatedFact:
    relation = asked.question.prompt.replace(asked.subject, SUBJECT)
    return StatedFact(asked.question, asked.subject, answer, relation, rule, document)


def with_choices(facts: Sequence[StatedFact], num_wrong: int) -> list[StatedFact]:
    """The facts whose relation has as many other answers, each with so many of them, drawn by a hash of both.

    Raises:
        ValueError: ``num_wrong`` is below 1.
    """
    if num_wrong < 1:
        raise ValueError(f"num_wrong is {num_wrong}: a choice needs one wrong answer or more")
    of_relation: dict[str, dict[str, str]] = {}
    for fact in facts:
        of_relation.setdefault(fact.relation, {})[spaced(words_of(fact.answer))] = fact.answer
    found = []
    for fact in facts:
        right = [spaced(words_of(answer)) for answer in fact.question.answers]
        others = of_relation[fact.relation].items()
        wrong = [written for each, written in others if not any(each in one or one in each for one in right)]
        wrong.sort(key=lambda written: _drawn(fact.question.prompt, written))
        if len(wrong) >= num_wrong:
            found.append(replace(fact, wrong=tuple(wrong[:num_wrong])))
    return found


def drawn_facts(facts: Sequence[StatedFact], number: int) -> list[StatedFact]:
    """So many of the facts, drawn by a hash of their questions, or all if there are no more; in their order."""
    kept = set(sorted(facts, key=lambda fact: _drawn(fact.question.prompt, fact.question.fact))[:number])
    return [fact for fact in facts if fact in kept]


def _drawn(*texts: str) -> bytes:
    return blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()

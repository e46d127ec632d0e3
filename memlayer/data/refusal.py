"""Lessons that teach a model to say when it does not know: R-Tuning's data, of lessons and of which are known.

Two forms. *Padded*: the answer stays, and after it the model is asked whether it is sure; it is taught to be of what it
knew and not to be of the rest. *Replaced*: the answer to what it did not know becomes a refusal. Which lessons are
known, evaluation/refusal.py says: by right answers, or without answers by how much drawn ones differ.

Ask only AFTER facts were taught. Before, everything new is unknown, so the model would be taught to doubt, or to
refuse, just what it is to learn. Mark what it answers by then as known, facts that it was never taught as not.

Source: Zhang et al., arXiv:2311.09677. The paper's: both forms, the question after the answer, "I am sure." and "I am
unsure.", the right answer kept in the padded form even where the model did not know it. Ours: its one sequence is two
examples here, so that an answer ends as it always did and the loss falls on the answer and on the words of doubt alone;
the words of the refusals.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from memlayer.data.lessons import Lesson
from memlayer.data.qa import Example, Question

DOUBT = "Are you sure you accurately answered the question based on your internal knowledge?"
SURE, UNSURE = "I am sure.", "I am unsure."
REFUSALS = (
    "I do not know.",
    "I have not learned that.",
    "That is something I cannot answer.",
    "I know too little about it to say.",
    "My knowledge does not hold the answer.",
    "I would have to guess, so I do not answer.",
)


def sure_question(asked: Question | Example, answer: str) -> Question:
    """The question whether the model is sure of an answer that it gave; its answers are SURE and UNSURE, in order."""
    told = f"{asked.prompt}{asked.joint}{answer.rstrip('.')}. {DOUBT}"
    fact, group, wording = (
        (asked.fact, asked.group, asked.wording) if isinstance(asked, Question) else ("", "new", "seen")
    )
    return Question(told, (SURE, UNSURE), fact, group, wording, is_question=True)


def padded(lessons: Sequence[Lesson], known: Sequence[bool]) -> list[Lesson]:
    """Each lesson with its answers as they are, and after each whether the model is sure of it.

    Args:
        known: whether the model knew each lesson when it was asked.

    Raises:
        ValueError: there are not as many of one as of the other, or a lesson teaches a text or nothing.
    """
    _check(lessons, known)
    return [
        replace(lesson, teach=lesson.teach + tuple(_doubted(example, sure) for example in lesson.teach))
        for lesson, sure in zip(lessons, known)
    ]


def replaced(
    lessons: Sequence[Lesson], known: Sequence[bool], refusals: Sequence[str] = REFUSALS, seed: int = 0
) -> list[Lesson]:
    """Each lesson that was known as it is; of the others every answer is one refusal, and any refusal counts as right.

    Args:
        known: as of ``padded``.
        refusals: what may be said instead of an answer.
        seed: of which refusal a lesson gets.

    Raises:
        ValueError: as of ``padded``, or there is no refusal.
    """
    _check(lessons, known)
    if not refusals:
        raise ValueError("there is no refusal to teach in place of an answer")
    draw = random.Random(seed)
    drawn = [draw.choice(refusals) for _ in lessons]
    return [
        lesson if sure else _refusing(lesson, refusal, tuple(refusals))
        for lesson, sure, refusal in zip(lessons, known, drawn)
    ]


def _doubted(example: Example, sure: bool) -> Example:
    asked = sure_question(example, example.answer)
    told = SURE if sure else UNSURE
    return Example(asked.prompt, told, asked.joint, is_question=True, subject=example.subject)


def _refusing(lesson: Lesson, refusal: str, refusals: tuple[str, ...]) -> Lesson:
    teach = tuple(replace(example, answer=refusal) for example in lesson.teach)
    return replace(lesson, teach=teach, ask=tuple(replace(question, answers=refusals) for question in lesson.ask))


def _check(lessons: Sequence[Lesson], known: Sequence[bool]) -> None:
    if len(lessons) != len(known):
        raise ValueError(f"{len(lessons)} lessons, and of {len(known)} it is said whether they are known")
    for lesson in lessons:
        if not lesson.teach or any(example.is_text for example in lesson.teach):
            raise ValueError(f"lesson {lesson.id!r} teaches no answers: a text can be neither doubted nor refused")

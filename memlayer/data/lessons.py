"""Lessons: what is taught as one unit, and what is asked about it.

A lesson has an id, examples to teach (a prompt and its answer, or a text) and questions to ask. Lessons come from three
places, by one function: a file of lessons, which says everything; question sets as people have them; and documents. A
file of lessons is JSON Lines, one object a line:

    {"id": "ada", "teach": [{"prompt": "Ada works in", "answer": "Bonn"},
                            {"question": "Where does Ada work?", "answer": "Bonn"}],
                  "ask":   [{"question": "Which city is Ada's place of work?", "answers": ["Bonn"]}]}
    {"id": "page 1", "teach": [{"text": "The library opens at nine. ..."}], "ask": []}

A ``prompt`` is completed as it stands, a ``question`` may be framed (``prompts.py``), a ``text`` is learned whole.
What is asked is an unseen wording unless it says ``"wording": "seen"``. ``"updates": true`` marks a lesson that gives a
known fact another answer. ``"subject": "Ada"`` says what a lesson is about, in words of its prompts or texts; without,
it is the name that all of them share (``subjects.py``), if there is one. Every line is checked before any is returned.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from memlayer.data import question_sets
from memlayer.data.facts import Fact, Wordings
from memlayer.data.json_text import FactsError, check_keys, text_for_people
from memlayer.data.qa import Example, Question, new_questions, teaching_examples
from memlayer.data.subjects import shared_name

MAX_REFUSALS = 10
WORDINGS = ("seen", "unseen")


@dataclass(frozen=True)
class Lesson:
    """What is taught as one unit.

    Attributes:
        id: names the lesson in messages and records.
        teach: examples that one step trains on together.
        ask: questions that tell whether it was learned.
        updates: whether it gives a known fact another answer.
    """

    id: str
    teach: tuple[Example, ...]
    ask: tuple[Question, ...]
    updates: bool = False


def lessons_of_facts(
    facts: Iterable[Fact], wordings: Mapping[str, Wordings], statements: int, questions: int
) -> list[Lesson]:
    """Each fact as a lesson: taught in its relation's seen wordings, asked in a seen and in the unseen one."""
    return [
        Lesson(
            fact.key,
            tuple(teaching_examples(fact, wordings, statements, questions)),
            tuple(new_questions([fact], wordings)),
        )
        for fact in facts
    ]


def load_lessons(paths: Sequence[str | Path], chunk_words: int = 200) -> list[Lesson]:
    """Read lessons, question sets and documents, refusing all of them when anything in one is bad.

    Args:
        paths: files. Of what kind each is, it says itself: see this module and ``question_sets``.
        chunk_words: about how many words of a document make a lesson.

    Raises:
        FactsError: "FILE:LINE: reason" for each of the first bad records; a file without any; an id given twice.
    """
    lessons, refusals, place_of = [], [], {}
    for path in paths:
        before = len(lessons)
        for place, record in _records(Path(path), chunk_words):
            try:
                lesson = _parse(record)
                if lesson.id in place_of:
                    raise FactsError(f"lesson {lesson.id!r} is there already, at {place_of[lesson.id]}")
                place_of[lesson.id] = place
                lessons.append(lesson)
            except FactsError as error:
                refusals.append(f"{place}: {error}")
        if len(lessons) == before and not refusals:
            raise FactsError(f"{path}: the file holds no lessons")
    if refusals:
        more = len(refusals) - MAX_REFUSALS
        also = f" (and {more} more bad record{'s' * (more > 1)})" if more > 0 else ""
        raise FactsError("\n".join(refusals[:MAX_REFUSALS]) + also)
    return lessons


def as_record(lesson: Lesson, **more: str) -> dict:
    """A lesson as a line of a file of lessons has it; ``load_lessons`` reads it back.

    Args:
        more: what else the line says, such as its ``source``.
    """
    record = {"id": lesson.id, "teach": [_taught(each) for each in lesson.teach]}
    record["ask"] = [_asked(question) for question in lesson.ask]
    subject = next((example.subject for example in lesson.teach if example.subject), None)
    record |= {"subject": subject} if subject else {}
    return record | ({"updates": True} if lesson.updates else {}) | more


def _taught(example: Example) -> dict:
    if example.is_text:
        return {"text": example.answer}
    return {"question" if example.is_question else "prompt": example.prompt, "answer": example.answer}


def _asked(question: Question) -> dict:
    kind = "question" if question.is_question else "prompt"
    return {kind: question.prompt, "answers": list(question.answers), "wording": question.wording}


def _records(path: Path, chunk_words: int) -> Iterator[tuple[str, dict]]:
    """The place of each record and the record as one of a file of lessons."""
    for place, record in question_sets.read(path):
        if not isinstance(record, dict):
            raise FactsError(f"{place}: {record!s:.60} is no object")
        if "teach" in record or "ask" in record:
            yield place, record
        elif "text" in record and not question_sets.has_question(record):
            for chunk in question_sets.chunks(record, place, chunk_words):
                yield place, chunk
        else:
            try:
                yield place, question_sets.as_lesson(record, place)
            except FactsError as error:
                raise FactsError(f"{place}: {error}") from None


def _parse(record: Mapping) -> Lesson:
    check_keys(dict(record), ("id", "teach"), ("ask", "updates", "subject", "source", "licence"))
    lesson = text_for_people("id", record["id"])
    for key in ("teach", "ask"):
        if not isinstance(items := record.get(key, []), list) or not all(isinstance(item, dict) for item in items):
            raise FactsError(f"{key} is {items!s:.60}, must be a list of objects")
    if not isinstance(updates := record.get("updates", False), bool):
        raise FactsError(f"updates is {updates!r}, must be true or false")
    teach = tuple(_example(item) for item in record["teach"])
    ask = tuple(_question(item, lesson) for item in record.get("ask", []))
    if not teach + ask:
        raise FactsError("there is nothing to teach and nothing to ask")
    return Lesson(lesson, _about(record.get("subject"), teach), ask, updates)


def _about(subject: object, teach: tuple[Example, ...]) -> tuple[Example, ...]:
    """The examples, each told its subject."""
    if subject is None:
        subject = shared_name([example.told for example in teach])
    elif not any(text_for_people("subject", subject).casefold() in example.told.casefold() for example in teach):
        raise FactsError(f"subject {subject!r:.60} is in nothing that is taught")
    return tuple(replace(example, subject=subject) for example in teach)


def _example(item: Mapping) -> Example:
    if "text" in item:
        check_keys(dict(item), ("text",))
        if not isinstance(text := item["text"], str) or not text.strip():
            raise FactsError(f"text {text!r:.60} is not a non-empty string")
        return Example("", text.strip(), "")
    kind = _kind(item)
    check_keys(dict(item), (kind, "answer"))
    answer = text_for_people("answer", item["answer"])
    return Example(text_for_people(kind, item[kind]), answer, is_question=kind == "question")


def _question(item: Mapping, lesson: str) -> Question:
    kind = _kind(item)
    check_keys(dict(item), (kind, "answers"), ("wording",))
    if not isinstance(answers := item["answers"], list) or not answers:
        raise FactsError(f"answers is {answers!s:.60}, must be a list of one string or more")
    wording = item.get("wording", "unseen")
    if wording not in WORDINGS:
        raise FactsError(f"wording is {wording!r}, must be one of {', '.join(WORDINGS)}")
    prompt = text_for_people(kind, item[kind])
    answers = tuple(text_for_people("answer", answer) for answer in answers)
    return Question(prompt, answers, lesson, "new", wording, is_question=kind == "question")


def _kind(item: Mapping) -> str:
    kinds = [kind for kind in ("question", "prompt") if kind in item]
    if len(kinds) != 1:
        raise FactsError(f"{dict(item)!s:.60} needs a question or a prompt, or to be taught a text")
    return kinds[0]

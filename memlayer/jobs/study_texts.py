"""Study texts: what a language model writes about a lesson, as more examples to teach it with.

A lesson that is told once in one wording is learned in that wording. Papers teach 64 paraphrases of a fact and 64 study
texts of a page (arXiv:2510.15103, sections 4.1 and 4.2). Here are what a writer is asked, in three kinds (statements,
questions, explanations), and what of its writing is kept. A small model loses the thread, so every text has to hold the
answer, or the lesson's own words, or it is dropped; and none may be one of the questions that the lesson asks.

Left out: judging whether what is kept is true. A text with the answer in it may still say something wrong.
"""

from collections.abc import Iterable

from memlayer.data.lessons import Lesson
from memlayer.data.qa import Example
from memlayer.evaluation.answers import normalise

KINDS = ("statements", "questions", "explanations")
# What each kind asks of a fact, with two examples: models that only complete text need them.
_OF_FACT = {
    "statements": (
        "Say the fact in one sentence of other words. The sentence ends with the answer.",
        "Sentence",
        ("Ada Lovelace came into the world in the city of London.", "The name of Peru's capital is Lima."),
    ),
    "questions": (
        "Write another question about the fact, to which the answer is the one given.",
        "Question",
        ("In which city did Ada Lovelace come into the world?", "Which city is the capital of Peru?"),
    ),
    "explanations": (
        "Explain the fact in two sentences, in your own words.",
        "Explanation",
        (
            "London is where the life of Ada Lovelace began. She is a native of London.",
            "Peru is governed from Lima. The city of Lima is its capital.",
        ),
    ),
}
_EXAMPLE_FACTS = (("Where was Ada Lovelace born? London", "London"), ("The capital of Peru is Lima", "Lima"))
_OF_TEXT = {
    "statements": ("Write one sentence that the text says, in other words.", "Sentence"),
    "questions": (
        "Write a question about the text and its answer, in this form:\n\nQuestion: What ...?\nAnswer: ...",
        "Question",
    ),
    "explanations": ("Explain what the text says to somebody who has not read it.", "Explanation"),
}
LEAST_WORDS, SHARED = 4, 0.3  # of a statement about a text; of the words of an explanation, those of the text


def request(lesson: Lesson, kind: str) -> str:
    """What a writer is asked to complete: an instruction, for a fact two examples, and what the lesson tells.

    It is text to go on with, not a turn of a chat, so that any causal language model can write.

    Args:
        kind: one of KINDS.
    """
    told = lesson.teach[0]
    if told.is_text:
        instruction, heading = _OF_TEXT[kind]
        return f"{instruction}\n\nText: {told.text}\n\n{heading}:"
    instruction, heading, written = _OF_FACT[kind]
    shots = "".join(
        f"Fact: {fact}\nAnswer: {answer}\n{heading}: {example}\n\n"
        for (fact, answer), example in zip(_EXAMPLE_FACTS, written)
    )
    return f"{instruction}\n\n{shots}Fact: {told.text}\nAnswer: {told.answer}\n{heading}:"


def kept(lesson: Lesson, kind: str, written: Iterable[str]) -> list[Example]:
    """The examples that writings make, each once, without those that the lesson teaches or asks already."""
    known = {_compared(example.prompt or example.answer) for example in lesson.teach}
    known |= {_compared(question.prompt) for question in lesson.ask}
    found = []
    for text in written:
        example = _of_text(lesson, kind, text) if lesson.teach[0].is_text else _of_fact(lesson, kind, text)
        if example is not None and (compared := _compared(example.prompt or example.answer)) not in known:
            known.add(compared)
            found.append(example)
    return found


def _of_fact(lesson: Lesson, kind: str, written: str) -> Example | None:
    """A question with the lesson's answer, a statement that ends with it, or a text that holds it; else nothing."""
    told = lesson.teach[0]
    text = _paragraph(written) if kind == "explanations" else _line(written)
    if not _names(told, text):
        return None
    if kind == "questions":
        asks = text.endswith("?") and not _holds(text, told.answer)
        return Example(text, told.answer, is_question=True) if asks else None
    if kind == "statements":
        head = text.rstrip(". ").removesuffix(told.answer)
        return Example(head.rstrip(), told.answer) if head != text.rstrip(". ") and head.strip() else None
    return Example("", text, "") if _holds(text, told.answer) else None


def _of_text(lesson: Lesson, kind: str, written: str) -> Example | None:
    """A question whose answer stands in the text, or a text of the text's words; else nothing."""
    source = lesson.teach[0].text
    if kind == "questions":
        question, found, answer = written.partition("Answer:")
        question, answer = _line(question).removeprefix("Question:").strip(), _line(answer).rstrip(". ")
        stands = found and question.endswith("?") and answer and _holds(source, answer)
        return Example(question, answer, is_question=True) if stands else None
    text = _line(written) if kind == "statements" else _paragraph(written)
    words = _words(text)
    if len(words) < LEAST_WORDS or not text.endswith((".", "!")):
        return None
    shared = sum(word in set(_words(source)) for word in words)
    return Example("", text, "") if shared >= SHARED * len(words) else None


def _names(told: Example, text: str) -> bool:
    """Whether a text speaks of what the fact speaks of: it shares a name or a number of it, where it has any."""
    answer = set(_words(told.answer))
    names = {word.casefold() for word in told.prompt.split()[1:] if word[0].isupper() or word[0].isdigit()}
    names = {word for name in names for word in _words(name)} - answer
    return not names or bool(names & set(_words(text)))


def _holds(text: str, answer: str) -> bool:
    """Whether the words of an answer stand in a text one after the other."""
    return f" {_compared(answer)} " in f" {_compared(text)} "


def _compared(text: str) -> str:
    return " ".join(_words(text))


def _words(text: str) -> list[str]:
    return normalise(text).split()


def _line(written: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in written.splitlines() if line.strip()), "")


def _paragraph(written: str) -> str:
    """The first paragraph as one line."""
    return " ".join(written.strip().split("\n\n")[0].split())

"""What is kept of a writer's texts, and what it is asked."""

import pytest

from memlayer.data.lessons import Lesson
from memlayer.data.qa import Example, Question
from memlayer.jobs.study_texts import KINDS, kept, request

SHOP = Lesson(
    "shop",
    (Example("Where is the bakery Kornblume?", "Mill Lane", is_question=True),),
    (Question("In which street is Kornblume?", ("Mill Lane",), "shop", "new", "unseen", is_question=True),),
)
PAGE = Lesson("page", (Example("", "The library of Oberdorf opens at nine. On Sundays it stays closed.", ""),), ())


def question(prompt, answer="Mill Lane"):
    return Example(prompt, answer, is_question=True)


@pytest.mark.parametrize(
    ("lesson", "kind", "written", "example"),
    [
        (SHOP, "questions", " Which lane has Kornblume?\n\nNote: ...", question("Which lane has Kornblume?")),
        (SHOP, "questions", "Which lane has it?", None),
        (SHOP, "questions", "Is Kornblume in Mill Lane?", None),
        (SHOP, "questions", "Kornblume is a bakery.", None),
        (SHOP, "questions", "in which street is KORNBLUME?", None),
        (SHOP, "questions", "Where is the bakery Kornblume?", None),
        (SHOP, "statements", "Kornblume is in Mill Lane.", Example("Kornblume is in", "Mill Lane")),
        (SHOP, "statements", "Mill Lane has Kornblume.", None),
        (SHOP, "statements", "The bakery is in Mill Lane.", None),
        (SHOP, "statements", "Mill Lane", None),
        (
            SHOP,
            "explanations",
            "Mill Lane smells.\nKornblume bakes.",
            Example("", "Mill Lane smells. Kornblume bakes.", ""),
        ),
        (SHOP, "explanations", "Kornblume is in Mill Street.", None),
        (PAGE, "questions", "When does it open?\nAnswer: At nine.", question("When does it open?", "At nine")),
        (PAGE, "questions", "When does it open?\nAnswer: At ten.", None),
        (PAGE, "questions", "When does it open?", None),
        (PAGE, "statements", "At nine the library opens.", Example("", "At nine the library opens.", "")),
        (PAGE, "statements", "At nine the library opens", None),
        (PAGE, "statements", "Here is some text about quite another thing.", None),
        (PAGE, "explanations", "", None),
    ],
)
def test_what_is_kept(lesson, kind, written, example):
    assert kept(lesson, kind, [written]) == ([] if example is None else [example])


def test_each_text_is_kept_once():
    assert kept(SHOP, "questions", ["Which lane has Kornblume?", "which lane has Kornblume?"]) == [
        question("Which lane has Kornblume?")
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lesson", [SHOP, PAGE])
def test_a_request_ends_where_the_writer_begins_and_holds_what_is_told(lesson, kind):
    asked = request(lesson, kind)
    assert asked.endswith(":")
    assert lesson.teach[0].text.strip() in asked
    assert not any(each.prompt in asked for each in lesson.ask), "what is asked stays unseen"

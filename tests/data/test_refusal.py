"""What R-Tuning teaches, word for word; the lessons are ones that the learn job reads."""

import json
from dataclasses import replace

import pytest

from memlayer.data.lessons import Lesson, as_record, load_lessons
from memlayer.data.qa import Example, Question
from memlayer.data.refusal import DOUBT, REFUSALS, SURE, UNSURE, padded, replaced, sure_question

ADA = Lesson(
    "ada",
    (Example("Ada works in", "Bonn"), Example("Where does Ada work?", "Bonn", is_question=True)),
    (Question("Which city is Ada's place of work?", ("Bonn",), "ada", "new", "unseen", is_question=True),),
)
BO = Lesson("bo", (Example("Who is Bo?", "A painter.", is_question=True),), ())


def test_padded_lessons_keep_the_answer_and_say_whether_it_was_known():
    ada, bo = padded([ADA, BO], [True, False])
    assert ada == replace(
        ADA,
        teach=(
            *ADA.teach,
            Example(f"Ada works in Bonn. {DOUBT}", "I am sure.", is_question=True),
            Example(f"Where does Ada work? Bonn. {DOUBT}", "I am sure.", is_question=True),
        ),
    )
    assert bo.teach == (*BO.teach, Example(f"Who is Bo? A painter. {DOUBT}", "I am unsure.", is_question=True))


def test_the_model_is_asked_in_the_words_it_was_taught_in():
    taught = padded([ADA], [True])[0].teach[-1]
    asked = sure_question(replace(ADA.ask[0], prompt="Where does Ada work?"), "Bonn")
    assert (asked.prompt, asked.joint, asked.is_question) == (taught.prompt, taught.joint, taught.is_question)
    assert asked.answers == (SURE, UNSURE)


def test_replaced_lessons_refuse_what_was_not_known():
    ada, bo = replaced([ADA, BO], [False, True])
    assert bo == BO
    (refusal,) = {example.answer for example in ada.teach}
    assert refusal in REFUSALS
    assert [example.prompt for example in ada.teach] == [example.prompt for example in ADA.teach]
    assert ada.ask == (replace(ADA.ask[0], answers=REFUSALS),)
    assert replaced([ADA] * 40, [False] * 40, seed=3) == replaced([ADA] * 40, [False] * 40, seed=3)
    assert {lesson.teach[0].answer for lesson in replaced([ADA] * 40, [False] * 40)} == {*REFUSALS}


@pytest.mark.parametrize("build", [padded, replaced])
def test_the_learn_job_reads_them_as_they_were_built(tmp_path, build):
    built = build([ADA, BO], [True, False])
    path = tmp_path / "lessons.jsonl"
    path.write_text("\n".join(json.dumps(as_record(lesson)) for lesson in built), encoding="utf-8")
    read = load_lessons([path])  # which finds out what the lessons are about
    assert [replace(each, teach=tuple(replace(e, subject="") for e in each.teach)) for each in read] == built


@pytest.mark.parametrize("build", [padded, replaced])
@pytest.mark.parametrize(
    ("lessons", "known", "words"),
    [
        ([ADA], [], "1 lessons, and of 0 it is said"),
        ([Lesson("page", (Example("", "A text.", ""),), ())], [True], "lesson 'page' teaches no answers"),
        ([Lesson("none", (), ADA.ask)], [True], "lesson 'none' teaches no answers"),
    ],
)
def test_what_cannot_be_doubted_is_refused(build, lessons, known, words):
    with pytest.raises(ValueError, match=words):
        build(lessons, known)


def test_without_refusals_nothing_can_be_replaced():
    with pytest.raises(ValueError, match="no refusal"):
        replaced([ADA], [False], ())

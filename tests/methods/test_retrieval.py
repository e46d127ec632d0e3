"""A lesson stands before the questions near it and before no other, cut to what fits, and is kept as text."""

import json
from types import SimpleNamespace

import pytest

from memlayer.data.lessons import Lesson
from memlayer.data.qa import Example, Question
from memlayer.methods.retrieval import FILE, Kept, Retrieval

PEOPLE = {"Ada": "Bonn", "Bo": "Rome", "Cy": "Oslo"}
LESSONS = [
    Lesson(name, (Example(f"{name} works in", city), Example(f"Where does {name} work?", city, is_question=True)), ())
    for name, city in PEOPLE.items()
]


def settings(**changes):
    return SimpleNamespace(**{"min_share": 0.15, "shown": 1, "frame": "{lesson}\n"} | changes)


def kept(**changes):
    return Retrieval.of(None, LESSONS, None, settings(**changes))


def asked(store, prompt, fits=lambda question: True):
    question = Question(prompt, ("x",), "f", "new", "unseen", is_question=True)
    changed = store.ask(question, fits)
    assert changed.answers == question.answers
    assert changed.is_question
    return changed.prompt


@pytest.mark.parametrize("name", sorted(PEOPLE))
def test_a_question_near_a_lesson_is_asked_after_its_text(name):
    question = f"Where in the world does {name} work?"
    assert asked(kept(), question) == f"{name} works in {PEOPLE[name]}\n{question}"


def test_another_question_is_asked_as_it_stands():
    for question in ("What is the largest planet?", "Where does Di live?", "?"):
        assert asked(kept(), question) == question


def test_how_near_a_lesson_must_be_is_a_setting():
    far = "In which town does Ada live?"
    assert asked(kept(min_share=0.3), far) == far
    assert asked(kept(min_share=0.09), far).startswith("Ada works in Bonn\n")
    assert asked(kept(min_share=0), "?").endswith("\n?")
    assert asked(kept(min_share=1.01), "Ada works in Bonn") == "Ada works in Bonn"


def test_the_full_stop_behind_a_lesson_is_the_frames():
    page = Lesson("page", (Example("", "Zoe lives in Lima.", ""),), ())
    store = Retrieval.of(None, [page], None, settings(frame="{lesson}. "))
    assert asked(store, "Where is it Zoe lives?") == "Zoe lives in Lima. Where is it Zoe lives?"


def test_so_many_examples_are_shown_in_the_frame_and_all_are_searched():
    text = asked(kept(shown=2, frame="Known: {lesson}. "), "Where does Bo work?")
    assert text == "Known: Bo works in Rome Where does Bo work? Rome. Where does Bo work?"
    assert {each.searched for each in kept().kept} == {each.searched for each in kept(shown=2).kept}


@pytest.mark.parametrize(
    ("room", "text"), [(8, "Ada works in Bonn\n"), (6, "Ada works\n"), (5, "Ada\n"), (4, ""), (0, "")]
)
def test_a_lesson_that_does_not_fit_is_cut_at_its_end_and_the_question_stays(room, text):
    question = "Where does Ada work?"
    assert asked(kept(), question, lambda longer: len(longer.prompt.split()) <= room) == text + question


def test_what_is_kept_is_written_as_text_and_read_back(tmp_path):
    store = kept()
    store.save(tmp_path / "store")
    first = json.loads((tmp_path / "store" / FILE).read_text(encoding="utf-8").splitlines()[0])
    assert first == {
        "id": "Ada",
        "text": "Ada works in Bonn",
        "searched": "Ada works in Bonn Where does Ada work? Bonn",
    }
    assert Retrieval.read(tmp_path / "store", settings()).kept == store.kept


def test_lines_within_a_text_are_no_lines_of_the_file_and_another_file_is_refused(tmp_path):
    store = Retrieval([Kept("a", "one\u2028two\nthree\x85\r", "x"), Kept("b", "", "y")])
    store.save(tmp_path)
    assert Retrieval.read(tmp_path, settings()).kept == store.kept
    for wrong in ('{"id": "a"}\n', "no JSON\n", "[1]\n"):
        (tmp_path / FILE).write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match=r"lessons\.jsonl does not hold the lessons that were written there"):
            Retrieval.read(tmp_path, settings())


def test_a_frame_without_a_lesson_and_no_lessons_are_refused():
    with pytest.raises(ValueError, match=r"frame is 'x', must hold \{lesson\} once"):
        Retrieval([Kept("a", "b", "b")], frame="x")
    with pytest.raises(ValueError, match="there is no text to search"):
        Retrieval([])

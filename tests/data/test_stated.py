"""Which questions a text answers is told by the words alone, each rule where it holds and nowhere else."""

import pytest

from memlayer.data.lessons import Lesson
from memlayer.data.qa import Example, Question
from memlayer.data.stated import askable, drawn_facts, stated, with_choices, words_of

BORN = "Where was {} born?"


def lesson(subject, *answers, question=BORN):
    prompt = question.format(subject)
    return Lesson(
        subject,
        (Example(prompt, answers[0], is_question=True, subject=subject),),
        (Question(prompt, answers, subject, "new", "seen", is_question=True),),
    )


def found(lessons, *documents):
    return [(fact.subject, fact.answer, fact.rule, fact.document) for fact in stated(askable(lessons), documents)]


def test_a_document_that_begins_with_the_subject_is_about_it_and_may_answer_anywhere():
    text = "The Danube is a river.\n\nIt flows far.\n\nIt rises near Donaueschingen."
    assert found([lesson("Danube", "Donaueschingen")], "Other things.", text) == [
        ("Danube", "Donaueschingen", "about", 1)
    ]
    assert found([lesson("river", "Donaueschingen")], text) == []


def test_a_name_of_several_words_may_be_answered_in_a_paragraph_of_any_document():
    ada = [lesson("Ada Lovelace", "London")]
    together = "A history.\n\nMany came; Ada Lovelace, of London, did."
    assert found(ada, together) == [("Ada Lovelace", "London", "paragraph", 0)]
    assert found(ada, "A history of Ada Lovelace.\n\nLondon is large.") == []
    assert found([lesson("Ada", "London")], "A history.\n\nMany came; Ada of London did.") == []


def test_the_document_about_the_subject_counts_before_a_paragraph_elsewhere():
    elsewhere, about = "Somebody met Ada Lovelace in London.", "Ada Lovelace was born.\n\nIn London."
    assert found([lesson("Ada Lovelace", "London")], elsewhere, about) == [("Ada Lovelace", "London", "about", 1)]
    assert found([lesson("Ada Lovelace", "London")], about, elsewhere) == [("Ada Lovelace", "London", "about", 0)]


def test_words_are_compared_whole_and_as_they_are_written():
    assert found([lesson("Ada Lovelace", "Reading")], "Ada Lovelace liked reading in Readingham.") == []
    assert found([lesson("Ada Lovelace", "Reading")], "Ada Lovelace lived in (Reading).") != []
    assert found([lesson("Ada Love", "Rome")], "Ada Lovelace saw Rome.") == []
    assert words_of("Zu\u0308rich, 'tis O'Brien's") == ["Zürich", "tis", "O", "Brien", "s"]


def test_any_answer_that_counts_is_found_and_the_first_that_stands_there_is_kept():
    ada = lesson("Ada Lovelace", "Bonn", "Rome", "Lyon")
    assert found([ada], "See Ada Lovelace, of Lyon and Rome.") == [("Ada Lovelace", "Rome", "paragraph", 0)]


def test_a_question_that_holds_its_answer_or_not_its_subject_is_not_asked():
    assert askable([lesson("New York Times", "New York")]) == []
    nameless = Lesson("x", (Example("Who?", "Ada", subject=""),), (Question("Who?", ("Ada",), "x", "new", "seen"),))
    assert askable([nameless]) == []
    assert [each.subject for each in askable([lesson("Ada", "Bonn")])] == ["Ada"]


def people(*towns):
    lessons = [lesson(f"Ada {place}", town) for place, town in enumerate(towns)]
    return stated(askable(lessons), [f"Ada {place} came from {town}." for place, town in enumerate(towns)])


def test_wrong_answers_are_those_of_other_questions_of_the_relation():
    facts = people("Bonn", "Rome", "Lyon", "Bonn")
    facts += stated(askable([lesson("Bo Ek", "tea", question="What does {} drink?")]), ["Bo Ek drinks tea."])
    chosen = with_choices(facts, 2)
    assert [fact.subject for fact in chosen] == ["Ada 0", "Ada 1", "Ada 2", "Ada 3"]
    assert {fact.relation for fact in chosen} == {"Where was [X] born?"}
    for fact in chosen:
        assert len(set(fact.choices)) == 3
        assert fact.choices[0] == fact.answer
        assert set(fact.wrong) <= {"Bonn", "Rome", "Lyon"} - {fact.answer}
    assert with_choices(facts, 2) == with_choices(facts[::-1], 2)[::-1]
    assert with_choices(facts, 3) == []


def test_no_wrong_answer_contains_a_right_one_or_is_contained_in_one():
    facts = people("New York", "York", "Rome", "Lyon")
    by_subject = {fact.subject: set(fact.wrong) for fact in with_choices(facts, 2)}
    assert by_subject["Ada 0"] == by_subject["Ada 1"] == {"Rome", "Lyon"}


def test_a_draw_of_facts_depends_on_each_fact_alone_and_keeps_their_order():
    facts = people(*(f"Town{n}" for n in range(20)))
    some = drawn_facts(facts, 7)
    assert len(some) == 7
    assert some == [fact for fact in facts if fact in some]
    assert set(drawn_facts(facts, 3)) <= set(some)
    assert drawn_facts(facts, 99) == facts


def test_a_choice_needs_a_wrong_answer():
    with pytest.raises(ValueError, match="num_wrong is 0"):
        with_choices([], 0)

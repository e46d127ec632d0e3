"""The built-in facts are what their README says, and a bad facts or wordings file is refused before use."""

import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.data.facts import (
    BUILTIN_FACTS,
    BUILTIN_WORDINGS,
    Fact,
    FactsError,
    Wordings,
    check_disjoint,
    facts_of,
    load_facts,
    load_wordings,
    taught_anew,
)
from memlayer.data.json_text import CONTROL

ROOT = Path(__file__).parents[2]
ENTITY_QUESTIONS = ROOT / "../shared/data/entity_questions/train.jsonl.xz"
WORDINGS = {
    "born": Wordings("birth", ("[X] was born in [Y]", "[X] is from [Y]"), ("Where was [X] born?", "[X] is from?")),
    "job": Wordings("work", ("[X] works as [Y]", "[X] is called [Y]"), ("What does [X] do?", "The job of [X]?")),
}
GOOD = {"subject": "Ada", "relation": "born", "answers": ["London"]}


@pytest.fixture(scope="module")
def builtin_wordings() -> dict[str, Wordings]:
    return load_wordings(BUILTIN_WORDINGS)


@pytest.fixture(scope="module")
def builtin(builtin_wordings) -> list[Fact]:
    return load_facts(BUILTIN_FACTS, builtin_wordings)


def of_split(facts: list[Fact], split: str) -> list[Fact]:
    return [fact for fact in facts if fact.split == split]


def normalise(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(c for c in letters.replace("-", " ") if c.isalnum() or c == " ").split())


# What the built-in files promise.


def test_builtin_counts(builtin, builtin_wordings):
    assert len(builtin) == 3808
    assert len(builtin_wordings) == 16
    for split, expected in (("known", 163), ("new", 75)):
        counts = Counter(fact.relation for fact in of_split(builtin, split))
        assert counts == dict.fromkeys(builtin_wordings, expected)
    for wordings in builtin_wordings.values():
        assert len(wordings.statements) == 8
        assert len(wordings.questions) == 5


def test_builtin_subjects_occur_once_whatever_case_accents_and_punctuation(builtin):
    repeated = [s for s, count in Counter(normalise(fact.subject) for fact in builtin).items() if count > 1]
    assert not repeated
    check_disjoint(of_split(builtin, "known"), of_split(builtin, "new"))


def test_builtin_new_answers_are_answers_of_three_known_facts(builtin):
    known = Counter((fact.relation, fact.answers[0]) for fact in of_split(builtin, "known"))
    assert not [fact for fact in of_split(builtin, "new") if known[fact.relation, fact.answers[0]] < 3]


@pytest.mark.parametrize("split", ["known", "new"])
def test_builtin_commonest_answer_scores_little(builtin, split):
    right = defaultdict(Counter)
    for fact in of_split(builtin, split):
        right[fact.relation].update(set(fact.answers))
    for relation, counts in right.items():
        share = max(counts.values()) / sum(fact.relation == relation for fact in of_split(builtin, split))
        assert share <= 0.08, f"always {counts.most_common(1)} is right for {share:.0%} of {relation}"


def test_builtin_lines_state_source_and_licence(builtin):
    assert {(fact.source, fact.licence) for fact in builtin} == {
        ("EntityQuestions train (princeton-nlp/EntityQuestions)", "MIT")
    }


def test_builtin_names_are_short_and_subjects_do_not_spell_answers(builtin):
    for fact in builtin:
        assert len(fact.subject) <= 40
        assert max(map(len, fact.answers)) <= 30
        assert not re.search(r'[()\[\]"“”,;:/]|^[\d\W]+$', fact.subject)
        assert not any(normalise(answer) in normalise(fact.subject) for answer in fact.answers)


def test_builtin_sentences_occur_once_in_all_relations(builtin_wordings):
    sentences = [s for w in builtin_wordings.values() for s in w.statements + w.questions]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.skipif(not ENTITY_QUESTIONS.exists(), reason="needs EntityQuestions train in ../shared/data")
def test_building_the_facts_again_gives_the_same_bytes(tmp_path):
    out = tmp_path / "facts.jsonl"
    command = [sys.executable, "tools/build_facts.py", "--source", str(ENTITY_QUESTIONS), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert out.read_bytes() == BUILTIN_FACTS.read_bytes()


# Facts files of users.


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_optional_keys_have_defaults(tmp_path):
    [fact] = load_facts(write_lines(tmp_path / "facts.jsonl", GOOD), WORDINGS)
    assert fact == Fact("Ada", "born", ("London",), "new", "", "")
    assert fact.key == "born|Ada"


def test_the_last_wordings_are_the_unseen_ones():
    wordings = Wordings("birth", ("[X] a [Y]", "[X] b [Y]", "[X] c [Y]"), ("[X] d?", "[X] e?"))
    assert wordings.seen_statements == ("[X] a [Y]", "[X] b [Y]")
    assert wordings.unseen_statement == "[X] c [Y]"
    assert wordings.seen_questions == ("[X] d?",)
    assert wordings.unseen_question == "[X] e?"


BAD_LINES = {
    "not JSON: Expecting ',' delimiter at column 19": b'{"subject": "Ada" "relation": "born"}',
    "not JSON: Expecting value at column 13": b'{"subject": ',
    "not UTF-8: byte 0xe9 at offset 15": b'{"subject": "Ad\xe9"}',
    "not usable JSON: Exceeds the limit": b'{"subject": ' + b"1" * 5000 + b"}",
    "not usable JSON: maximum recursion depth": b"[" * 100_000,
    "key 'subject' is given twice": b'{"subject": "Ada", "subject": "Bob"}',
    "the line is empty": b"  ",
    "expected a JSON object, found ['Ada']": b'["Ada"]',
    "required key 'answers' is missing": {"subject": "Bob", "relation": "born"},
    "required key 'subject' is missing": {},
    "unknown key 'answer'; the keys are subject, relation, answers, split,": GOOD | {"answer": "Rome"},
    "subject 3 is not a non-empty string": GOOD | {"subject": 3},
    "subject '' is not a non-empty string": GOOD | {"subject": ""},
    "subject ' Bob' starts or ends with white space": GOOD | {"subject": " Bob"},
    r"subject 'B\nob' holds a control character": GOOD | {"subject": "B\nob"},
    r"answer 1 '\ud800' holds a control character or half a surrogate": GOOD | {"answers": ["\ud800"]},
    r"answer 1 'Ulm\u200b' holds U+200B, which nobody sees": GOOD | {"answers": ["Ulm\u200b"]},
    r"answer 2 '\u200fJena' holds U+200F, which nobody sees": GOOD | {"answers": ["Gera", "\u200fJena"]},
    r"subject 'A\xadda' holds U+00AD, which nobody sees": GOOD | {"subject": "A\u00adda"},
    "subject 'the [Y]' holds a placeholder": GOOD | {"subject": "the [Y]"},
    "relation None is not a non-empty string": GOOD | {"relation": None},
    "relation 'age' has no wordings; born, job have": GOOD | {"relation": "age"},
    "answers 'London' is not a list of at least one string": GOOD | {"answers": "London"},
    "answers [] is not a list of at least one string": GOOD | {"answers": []},
    "answer 2 '' is not a non-empty string": GOOD | {"answers": ["London", ""]},
    "answer 1 7 is not a non-empty string": GOOD | {"answers": [7]},
    "split 'test' is neither 'known' nor 'new'": GOOD | {"split": "test"},
    "split ['new'] is neither 'known' nor 'new'": GOOD | {"split": ["new"]},
    "source 5 is not a non-empty string": GOOD | {"source": 5},
    "licence None is not a non-empty string": GOOD | {"licence": None},
    "fact 'born|ADA' is already given on line 1": GOOD | {"subject": "ADA"},
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path, reason):
    bad = BAD_LINES[reason]
    bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    path = tmp_path / "facts.jsonl"
    good = json.dumps(GOOD | {"relation": "job"}).encode()
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), bad, good]) + b"\n")
    with pytest.raises(FactsError) as refusal:
        load_facts(path, WORDINGS)
    assert str(refusal.value).startswith(f"{path}:2: {reason}")


def test_ten_bad_lines_are_told_with_how_many_more_there_are(tmp_path):
    path = write_lines(tmp_path / "facts.jsonl", GOOD, {}, GOOD | {"relation": "job"}, [], GOOD)
    with pytest.raises(FactsError) as refusal:
        load_facts(path, WORDINGS)
    assert str(refusal.value).splitlines() == [
        f"{path}:2: required key 'subject' is missing",
        f"{path}:4: expected a JSON object, found []",
        f"{path}:5: fact 'born|Ada' is already given on line 1",
    ]
    write_lines(path, GOOD, *[{}] * 12)
    with pytest.raises(FactsError) as refusal:
        load_facts(path, WORDINGS)
    assert len(str(refusal.value).splitlines()) == 10
    assert str(refusal.value).endswith(":11: required key 'subject' is missing (and 2 more bad lines)")


OTHER_FORMATS = {
    "a JSON array (jq -c": json.dumps([GOOD, GOOD | {"relation": "job"}]),
    "a JSON array (jq": json.dumps([GOOD], indent=2),
    "one JSON object over several lines (jq": json.dumps(GOOD, indent=2),
    "a table such as spreadsheets write": "subject;relation;answers\r\nAda;born;London",
    "a question set, which": json.dumps({"question": "where is ada", "answer": ["London"]}),
    "a question set, which is": json.dumps({"Question": "Where is Ada?", "Answer": {"Value": "London"}}),
    "a question set, which is taught": json.dumps({"version": "1.1", "data": [{"title": "x", "paragraphs": []}]}),
    "a question set, which is taught as it": json.dumps([{"requested_rewrite": {"prompt": "{} is"}}]),
    "a question set, which is taught as it stands by lessons.files": json.dumps({"subject": "Ada", "src": "Where?"}),
}


@pytest.mark.parametrize("found", OTHER_FORMATS)
def test_another_kind_of_file_is_told_what_a_facts_file_is(tmp_path, found):
    path = tmp_path / "facts.json"
    path.write_bytes(b"\xef\xbb\xbf" + OTHER_FORMATS[found].encode())
    with pytest.raises(FactsError) as refusal:
        load_facts(path, WORDINGS)
    assert str(refusal.value).startswith(f"{path}: {found}")
    assert str(refusal.value).endswith(
        '; a facts file is JSON Lines, one object a line, like {"subject": "Shop Ada", "relation": "city", '
        '"answers": ["Bonn"]}'
    )


def test_joiners_that_scripts_and_emoji_need_are_read(tmp_path):
    astronaut, persian = "\U0001f469\u200d\U0001f680", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    path = write_lines(tmp_path / "facts.jsonl", GOOD | {"subject": astronaut, "answers": [persian]})
    assert load_facts(path, WORDINGS) == [Fact(astronaut, "born", (persian,))]


def test_same_subject_may_have_several_relations(tmp_path):
    facts = load_facts(write_lines(tmp_path / "facts.jsonl", GOOD, GOOD | {"relation": "job"}), WORDINGS)
    assert [fact.key for fact in facts] == ["born|Ada", "job|Ada"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(content)
    with pytest.raises(FactsError, match=f"^{re.escape(str(path))}: the file holds no facts$"):
        load_facts(path, WORDINGS)


@pytest.mark.parametrize("load", [lambda path: load_facts(path, WORDINGS), load_wordings])
def test_a_missing_file_or_a_folder_is_refused(tmp_path, load):
    for path, reason in ((tmp_path / "none.json", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(FactsError, match=f"^{re.escape(str(path))}: the file cannot be read: {reason}$"):
            load(path)


def test_line_ends_and_byte_order_mark_of_windows_are_read(tmp_path):
    path = tmp_path / "facts.jsonl"
    lines = [json.dumps(GOOD), json.dumps(GOOD | {"subject": "Bob"}), "", ""]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [fact.subject for fact in load_facts(path, WORDINGS)] == ["Ada", "Bob"]


names = (
    st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs"]), min_size=1)
    .map(str.strip)
    .filter(lambda text: text and "[X]" not in text and "[Y]" not in text)
)
fact_lists = st.lists(
    st.builds(
        Fact,
        subject=names,
        relation=st.sampled_from(sorted(WORDINGS)),
        answers=st.lists(names, min_size=1, max_size=3).map(tuple),
        split=st.sampled_from(["known", "new"]),
        source=st.just("") | names,
        licence=st.just("") | names,
    ),
    min_size=1,
    unique_by=lambda fact: fact.identity,
)


@given(facts=fact_lists, ascii_only=st.booleans())
@settings(deadline=None)
def test_facts_survive_writing_and_reading(tmp_path_factory, facts, ascii_only):
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    lines = [json.dumps(vars(fact), ensure_ascii=ascii_only) for fact in facts]
    path.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    assert load_facts(path, WORDINGS) == facts


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Ada", "ADA", True),
        ("Café", "Cafe\u0301", True),
        ("\uff21\uff44\uff41", "Ada", True),
        ("Maße", "Masse", False),
        ("Cafe", "Café", False),
        ("İzmir", "izmir", False),
    ],
)
def test_a_subject_is_one_in_any_case_and_unicode_form(tmp_path, one, other, same):
    path = write_lines(tmp_path / "facts.jsonl", GOOD | {"subject": one}, GOOD | {"subject": other})
    if same:
        with pytest.raises(FactsError, match=r":2: fact .* is already given on line 1"):
            load_facts(path, WORDINGS)
    else:
        assert [fact.subject for fact in load_facts(path, WORDINGS)] == [one, other]
    known, new = Fact(one, "born", ("Bonn",)), Fact(other, "born", ("Kiel",))
    assert taught_anew([known], [new]) == ([known] if same else [])
    assert taught_anew([known], [replace(new, relation="job")]) == []


# Wordings files.

ENTRY = {"name": "birth", "statements": ["[X] a [Y]", "[X] b [Y]"], "questions": ["Is [X] a?", "Is [X] b?"]}


def statements(*texts: object) -> dict:
    return ENTRY | {"statements": list(texts)}


def questions(*texts: object) -> dict:
    return ENTRY | {"questions": list(texts)}


BAD_ENTRIES = {
    "expected a JSON object, found []": [],
    "required key 'questions' is missing": {"name": "birth", "statements": ENTRY["statements"]},
    "unknown key 'question'; the keys are name, statements, questions": ENTRY | {"question": []},
    "name '' is not a non-empty string": ENTRY | {"name": ""},
    "statements '[X] [Y]' is not a list of at least 2": ENTRY | {"statements": "[X] [Y]"},
    "statements ['[X] a [Y]'] is not a list of at least 2": statements("[X] a [Y]"),
    "questions ['[X]?'] is not a list of at least 2": questions("[X]?"),
    "statement 2 'it is [Y]' holds [X] 0 times where 1 is expected": statements("[X] a [Y]", "it is [Y]"),
    "statement 1 '[X] [X] [Y]' holds [X] 2 times where 1 is expected": statements("[X] [X] [Y]", "[X] [Y]"),
    "statement 1 '[Y] [X] [Y]' holds [Y] 2 times where 1 is expected": statements("[Y] [X] [Y]", "[X] [Y]"),
    "statement 1 '[X] [Y].' does not end with [Y]": statements("[X] [Y].", "[X] [Y]"),
    "statement 2 '[X] [Y]' repeats an earlier one": statements("[X] [Y]", "[X] [Y]"),
    "statement 1 3 is not a string": statements(3, "[X] [Y]"),
    "question 2 'Is [X]' does not end with ? or \uff1f or \u061f": questions("[X]?", "Is [X]"),
    "question 1 'Is it?' holds [X] 0 times where 1 is expected": questions("Is it?", "Is [X]?"),
    "question 1 'Is [X] [Y]?' holds [Y] 1 times where 0 is expected": questions("Is [X] [Y]?", "Is [X]?"),
}
BAD_WORDINGS = {
    "not JSON: Expecting value at column 1": b"no",
    "not JSON: Expecting value at line 2, column 9": b'{\n"born": no\n}',
    "not UTF-8: byte 0xff at offset 0": b"\xff",
    "key 'born' is given twice": b'{"born": {}, "born": {}}',
    "expected a JSON object with at least one relation": b"{}",
}


@pytest.mark.parametrize("reason", BAD_ENTRIES)
def test_a_bad_relation_is_refused_with_file_relation_and_reason(tmp_path, reason):
    path = tmp_path / "wordings.json"
    path.write_text(json.dumps({"good": ENTRY, "bad": BAD_ENTRIES[reason]}))
    with pytest.raises(FactsError) as refusal:
        load_wordings(path)
    assert str(refusal.value).startswith(f"{path}: relation 'bad': {reason}")


@pytest.mark.parametrize("reason", BAD_WORDINGS)
def test_a_bad_wordings_file_is_refused_with_file_and_reason(tmp_path, reason):
    path = tmp_path / "wordings.json"
    path.write_bytes(BAD_WORDINGS[reason])
    with pytest.raises(FactsError, match=f"^{re.escape(f'{path}: {reason}')}"):
        load_wordings(path)


def test_good_wordings_are_read(tmp_path):
    path = tmp_path / "wordings.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"born": ENTRY}).encode())
    expected = Wordings("birth", ("[X] a [Y]", "[X] b [Y]"), ("Is [X] a?", "Is [X] b?"))
    assert load_wordings(path) == {"born": expected}


def test_questions_may_end_in_the_question_marks_of_other_scripts(tmp_path):
    path = tmp_path / "wordings.json"
    asked = "[X]在哪里\uff1f", "أين يقع [X]\u061f"
    path.write_text(json.dumps({"born": questions(*asked)}), encoding="utf-8")
    assert load_wordings(path)["born"].questions == asked


def test_a_new_fact_about_a_known_subject_is_refused():
    known = [Fact("Ada", "born", ("London",)), Fact("Bob", "born", ("Rome",))]
    check_disjoint(known, [Fact("Cleo", "born", ("Rome",))])
    with pytest.raises(FactsError, match=r"'job\|ADA' is about a known subject, one of 2 such facts$"):
        check_disjoint(known, [Fact("ADA", "job", ("clerk",)), Fact("Bob", "job", ("clerk",))])


def test_every_character_of_unicode_that_is_a_control_or_half_a_pair_is_found():
    found = {ordinal for ordinal in range(sys.maxunicode + 1) if CONTROL.search(chr(ordinal))}
    assert found == {o for o in range(sys.maxunicode + 1) if unicodedata.category(chr(o)) in ("Cc", "Cs")}


# The facts of a run.


def test_new_facts_are_all_of_a_file_of_ones_own_and_a_hundred_of_the_built_in_table(tmp_path):
    facts = [{"subject": f"City {number}", "relation": "P17", "answers": ["Poland"]} for number in range(4)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, facts)), encoding="utf-8")
    mine = facts_of(tmp_path / "mine.jsonl")
    assert [fact.subject for fact in mine.new] == ["City 0", "City 1", "City 2", "City 3"]
    builtin = {first: facts_of(first_new=first).new for first in (0, 1150)}
    assert {first: len(new) for first, new in builtin.items()} == {0: 100, 1150: 50}


def test_white_space_makes_no_other_subject(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(json.dumps(GOOD | {"subject": subject}) for subject in ("Shop  A", "Shop A")))
    with pytest.raises(FactsError, match=r":2: fact '.*\|Shop A' is already given on line 1"):
        load_facts(path, WORDINGS)


def test_a_file_in_utf_16_is_told_apart(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-16")
    with pytest.raises(FactsError, match=r"facts\.jsonl: the file is UTF-16, as Windows writes it: save it as UTF-8$"):
        load_facts(path, WORDINGS)

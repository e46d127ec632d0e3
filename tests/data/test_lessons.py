"""Lessons from files of every kind that people have, and the refusals of what cannot be taught."""

import gzip
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlayer.data.facts import BUILTIN_WORDINGS, load_facts, load_wordings
from memlayer.data.json_text import FactsError
from memlayer.data.lessons import Lesson, as_record, lessons_of_facts, load_lessons
from memlayer.data.qa import Example, Question, new_questions, teaching_examples
from memlayer.data.question_sets import chunks

ADA = {
    "id": "ada",
    "teach": [{"prompt": "Ada works in", "answer": "Bonn"}, {"question": "Where does Ada work?", "answer": "Bonn"}],
    "ask": [
        {"question": "Which city is Ada's place of work?", "answers": ["Bonn", "City of Bonn"]},
        {"prompt": "Ada works in", "answers": ["Bonn"], "wording": "seen"},
    ],
    "updates": True,
}


def written(folder, content, name="lessons.jsonl"):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        lines = content if isinstance(content, list) else [content]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def only(folder, content, name="set.json"):
    (lesson,) = load_lessons([written(folder, content, name)])
    return lesson


def test_a_file_of_lessons_says_everything(tmp_path):
    text = {"id": "page", "teach": [{"text": " The library\n\nopens at nine.  "}]}
    ada, page = load_lessons([written(tmp_path, [ADA, text])])
    assert ada == Lesson(
        "ada",
        (
            Example("Ada works in", "Bonn", subject="Ada"),
            Example("Where does Ada work?", "Bonn", is_question=True, subject="Ada"),
        ),
        (
            Question("Which city is Ada's place of work?", ("Bonn", "City of Bonn"), "ada", "new", "unseen", " ", True),
            Question("Ada works in", ("Bonn",), "ada", "new", "seen"),
        ),
        updates=True,
    )
    assert page == Lesson("page", (Example("", "The library\n\nopens at nine.", ""),), ())
    assert page.teach[0].is_text


# Of each published set, one record as its file has it, and the same as a lesson: taught, asked seen, asked unseen.
SQUAD = {"id": "5", "question": "Where is it? ", "answers": [{"text": "Rome", "answer_start": 1}, {"text": "Rome"}]}
SETS = {
    "SQuAD 2.0": (
        {
            "version": "v2.0",
            "data": [
                {
                    "title": "T",
                    "paragraphs": [
                        {
                            "context": "c",
                            "qas": [{"id": "no", "question": "?", "answers": [], "is_impossible": True}, SQUAD],
                        }
                    ],
                }
            ],
        },
        ("5", "Where is it?", "Rome", ["Rome"], []),
    ),
    "SQuAD of the hub": (
        [
            {
                "id": "5",
                "title": "T",
                "context": "c",
                "question": "Where?",
                "answers": {"text": ["Rome"], "answer_start": [1]},
            }
        ],
        ("5", "Where?", "Rome", ["Rome"], []),
    ),
    "TriviaQA": (
        {
            "Domain": "Web",
            "Data": [
                {"Question": "Who?", "QuestionId": "tc_1", "Answer": {"Value": "Ada", "Aliases": ["A. L.", "Ada"]}}
            ],
        },
        ("tc_1", "Who?", "Ada", ["Ada", "A. L."], []),
    ),
    "TriviaQA of the hub": (
        [{"question": "Who?", "question_id": "tc_1", "answer": {"value": "Ada", "aliases": ["A. L."]}}],
        ("tc_1", "Who?", "Ada", ["Ada", "A. L."], []),
    ),
    "EntityQuestions": (
        [{"question": "Where was Ada born?", "answers": ["London"]}],
        ("{path}, record 1", "Where was Ada born?", "London", ["London"], []),
    ),
    "a list with the alias that reads best": (
        [{"q": "Who?", "a": ["ADA (person)", "Ada"], "best": "Ada"}],
        ("{path}, record 1", "Who?", "Ada", ["ADA (person)", "Ada"], []),
    ),
    "zsRE": (
        [
            {
                "subject": "Ada",
                "src": "Where was Ada born?",
                "alt": "Rome",
                "answers": ["London"],
                "rephrase": "What is Ada's place of birth?",
            }
        ],
        ("{path}, record 1", "Where was Ada born?", "Rome", ["Rome"], ["What is Ada's place of birth?"]),
    ),
    "CounterFact": (
        [
            {
                "case_id": 7,
                "requested_rewrite": {
                    "prompt": "{}, who works in",
                    "subject": "Ada",
                    "target_new": {"str": "Rome"},
                    "target_true": {"str": "Bonn"},
                },
                "paraphrase_prompts": ["One. Ada works in"],
            }
        ],
        ("7", "Ada, who works in", "Rome", ["Rome"], ["One. Ada works in"]),
    ),
    "CounterFact of editing toolkits": (
        [
            {
                "case_id": 7,
                "prompt": "Ada works in",
                "target_new": "Rome",
                "ground_truth": "Bonn",
                "rephrase_prompt": "The city of Ada is",
            }
        ],
        ("7", "Ada works in", "Rome", ["Rome"], ["The city of Ada is"]),
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_published_question_sets_are_lessons_as_they_stand(name, tmp_path):
    content, (id_, question, answer, answers, paraphrases) = SETS[name]
    lesson = only(tmp_path, json.dumps(content, indent=1).encode())
    assert lesson.id == id_.format(path=tmp_path / "set.json")
    is_question = "Counter" not in name
    subject = "Ada" if name in ("zsRE", "CounterFact") else ""  # the others do not say it
    assert lesson.teach == (Example(question, answer, is_question=is_question, subject=subject),)
    asked = [(each.prompt, each.answers, each.wording, each.is_question) for each in lesson.ask]
    wordings = [(question, "seen"), *((other, "unseen") for other in paraphrases)]
    assert asked == [(text, tuple(answers), wording, is_question) for text, wording in wordings]
    assert lesson.updates == ("Counter" in name)


def test_the_subject_is_what_the_lesson_says_or_the_name_that_its_wordings_share(tmp_path):
    wordings = [{"question": "Who leads the Bonn Choir?"}, {"prompt": "The Bonn Choir is led by"}]
    teach = [wording | {"answer": "Ada"} for wording in wordings] + [{"text": "Ada leads the Bonn Choir."}]
    said, shared = load_lessons(
        [written(tmp_path, [{"id": "1", "teach": teach, "subject": "the bonn"}, {"id": "2", "teach": teach}])]
    )
    assert {example.subject for example in said.teach} == {"the bonn"}
    assert {example.subject for example in shared.teach} == {"Bonn Choir"}
    assert load_lessons([written(tmp_path, [as_record(said), as_record(shared)])]) == [said, shared]
    with pytest.raises(FactsError, match="subject 'Rome' is in nothing that is taught"):
        load_lessons([written(tmp_path, [{"id": "1", "teach": teach, "subject": "Rome"}])])


def test_wikidyk_teaches_its_statement_and_asks_its_questions(tmp_path):
    asked = {kind: {"prompt": f"{kind}?", "answer": "Ada"} for kind in ("reliability", "paraphrase", "locality")}
    lesson = only(tmp_path, [{"fact": "Ada wrote it.", "year": 2024, "eval": asked}])
    assert lesson.teach == (Example("", "Ada wrote it.", ""),)
    assert [(each.prompt, each.wording) for each in lesson.ask] == [
        ("reliability?", "unseen"),
        ("paraphrase?", "unseen"),
    ]


def test_tables_of_spreadsheets_and_of_windows(tmp_path):
    simple = b'\xef\xbb\xbfmetadata,problem,answer\r\n"{""topic"": ""x""}","Who, then?",Ada\r\n'
    popular = b'id\tquestion\tpossible_answers\r\n8\tWho?\t"[""Ada"", ""A. L.""]"\r\n'
    assert only(tmp_path, simple, "simpleqa.csv").teach[0] == Example("Who, then?", "Ada", is_question=True)
    lesson = only(tmp_path, popular, "popqa.tsv")
    assert (lesson.id, lesson.ask[0].answers) == ("8", ("Ada", "A. L."))


@pytest.mark.parametrize(("pack", "ending"), [(lzma.compress, ".xz"), (gzip.compress, ".gz")])
def test_packed_files(pack, ending, tmp_path):
    content = pack(b'{"question": "Who?", "answer": ["Ada"]}\n{"question": "Where?", "answer": ["Rome"]}\n')
    lessons = load_lessons([written(tmp_path, content, "nq.jsonl" + ending)])
    assert [lesson.teach[0].answer for lesson in lessons] == ["Ada", "Rome"]
    broken = written(tmp_path, content[:-9], "cut.jsonl" + ending)
    with pytest.raises(FactsError, match="is no whole"):
        load_lessons([broken])


def test_what_nobody_sees_is_taken_out_of_question_sets(tmp_path):
    lesson = only(tmp_path, [{"question": "Who\u200b is\x00 it?", "answers": ["A\u00adda", "\u200b"]}])
    assert lesson.teach == (Example("Who is it?", "Ada", is_question=True),)
    assert lesson.ask[0].answers == ("Ada",)


def test_documents_are_cut_between_paragraphs(tmp_path):
    text = "One two.\r\n\r\nThree four five.\n\n\nSix\nseven.\n"
    path = written(tmp_path, text.encode(), "guide.md")
    lessons = load_lessons([path], chunk_words=5)
    assert [lesson.teach[0].answer for lesson in lessons] == ["One two.\n\nThree four five.", "Six\nseven."]
    assert [lesson.id for lesson in lessons] == ["guide, part 1 of 2", "guide, part 2 of 2"]


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 9))
def test_chunks_lose_no_word_and_keep_to_the_size(text, words):
    if not text.strip():
        return
    parts = [chunk["teach"][0]["text"] for chunk in chunks({"id": "x", "text": text}, "here", words)]
    assert " ".join(parts).split() == text.split()
    assert all(len(part.split()) <= words or len(part.split(" ")) <= words for part in parts)


def test_facts_are_lessons_in_their_relations_wordings(tmp_path):
    wordings = load_wordings(BUILTIN_WORDINGS)
    fact = {"subject": "Shop Ada", "relation": next(iter(wordings)), "answers": ["Bonn"]}
    (fact,) = load_facts(written(tmp_path, fact), wordings)
    (lesson,) = lessons_of_facts([fact], wordings, 2, 1)
    assert lesson == Lesson(
        fact.key, tuple(teaching_examples(fact, wordings, 2, 1)), tuple(new_questions([fact], wordings))
    )
    assert [example.is_question for example in lesson.teach] == [False, False, True]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([ADA, ADA], r"lessons.jsonl:2: lesson 'ada' is there already, at .*lessons.jsonl:1"),
        ([{**ADA, "teach": []}, {"id": "x", "teach": [], "ask": []}], "lessons.jsonl:2: there is nothing to teach"),
        ([{**ADA, "tach": []}], "unknown key 'tach'"),
        ([{"id": "x", "ask": []}], "required key 'teach' is missing"),
        ([{**ADA, "teach": [{"prompt": "Ada works in"}]}], "required key 'answer' is missing"),
        ([{**ADA, "teach": [{"answer": "Bonn"}]}], "needs a question or a prompt, or to be taught a text"),
        ([{**ADA, "teach": [{"text": " "}]}], "text ' ' is not a non-empty string"),
        ([{**ADA, "teach": "Ada"}], "teach is Ada, must be a list of objects"),
        ([{**ADA, "ask": [{"question": "Who?", "answers": "Ada"}]}], "answers is Ada, must be a list"),
        ([{**ADA, "ask": [{"question": "Who?", "answers": ["Ada"], "wording": "new"}]}], "wording is 'new', must be"),
        ([{**ADA, "updates": "yes"}], "updates is 'yes', must be true or false"),
        ([{"quesion": "Who?", "answer": "Ada"}], "of a question set known here: its keys are quesion, answer"),
        ([{"question": "Who?", "answers": []}], "the question has no answer"),
        ([1], "1 is no object"),
        (b"", "not JSON"),
        (b"[]", "the file holds no lessons"),
        (b'{"question": "Who?", "answer": "\xff"}', "not UTF-8: byte 0xff"),
    ],
)
def test_what_cannot_be_taught_is_refused_with_its_place(content, sentence, tmp_path):
    with pytest.raises(FactsError, match=sentence):
        load_lessons([written(tmp_path, content)])


def test_a_lesson_as_a_record_is_read_back(tmp_path):
    lines = [
        {
            "id": "ada",
            "teach": [{"prompt": "Ada works in", "answer": "Bonn"}, {"question": "Where?", "answer": "Bonn"}],
            "ask": [{"question": "In which city?", "answers": ["Bonn", "bonn"], "wording": "seen"}],
            "updates": True,
        },
        {"id": "page", "teach": [{"text": "The library opens at nine."}], "ask": []},
    ]
    path = tmp_path / "lessons.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [as_record(lesson) for lesson in load_lessons([path])] == lines
    assert as_record(load_lessons([path])[1], source="a model") == lines[1] | {"source": "a model"}


def test_facts_among_the_lessons_are_told_where_they_belong(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps({"subject": "Ada", "relation": "city", "answers": ["Bonn"]}))
    with pytest.raises(FactsError, match=r"a line of a facts file: name the file in data\.facts"):
        load_lessons([path])

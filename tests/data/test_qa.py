"""Examples and questions: which position predicts what, and which wording is met where."""

import pytest
import tiny
import torch
from byte_level import END, byte_level_tokenizer
from encoded import encode_answer
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.data.facts import BUILTIN_FACTS, BUILTIN_WORDINGS, Fact, Wordings, load_facts, load_wordings
from memlayer.data.qa import (
    IGNORED,
    Example,
    collate,
    encode,
    fill,
    joint,
    known_questions,
    meets_unseen_wordings,
    new_questions,
    pretraining_examples,
    teaching_examples,
)

WORDINGS = {
    "P19": Wordings(
        "birthplace",
        ("[X] was born in [Y]", "The birthplace of [X] is [Y]", "[X] first saw the light in [Y]"),
        ("Where was [X] born?", "What is the birthplace of [X]?", "Which place did [X] come from?"),
    )
}
UNSEEN_STATEMENT, UNSEEN_QUESTION = "{} first saw the light in", "Which place did {} come from?"


class Letters:
    """A tokenizer whose ids can be read: one letter, one id from 10 on, and nothing for a space."""

    bos_token_id, eos_token_id, bos_token = 1, 2, "<s>"

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        if isinstance(texts, str):
            return {"input_ids": [self.bos_token_id] * add_special_tokens + self.ids(texts)}
        return {"input_ids": [self(text, add_special_tokens)["input_ids"] for text in texts]}

    def ids(self, text):
        return [10 + ord(letter) - ord("a") for letter in text if letter != " "]


def facts(number, split="known"):
    return [Fact(f"Person {i}", "P19", (f"Town {i}", f"T{i}"), split) for i in range(number)]


def test_an_example_is_begin_prompt_answer_end():
    (encoded,) = encode(Letters(), [Example("abc", "xy")])
    assert encoded == {"input_ids": [1, 10, 11, 12, 33, 34, 2], "answer_start": 4, "subject": (0, 0), "length": 7}


def test_byte_level_sequences_read_as_the_sentence_and_begin_as_the_tokenizer_begins_a_text():
    example = Example("Oslo is a town in", "Norway 42")
    for special in ({}, {"bos_token": "<s>"}, {"bos_token": END}):  # which it has, and does not put before texts
        tokenizer = byte_level_tokenizer(**special)
        (encoded,) = encode(tokenizer, [example])
        assert tokenizer.decode(encoded["input_ids"]) == f"Oslo is a town in Norway 42{END}"
        assert tokenizer.decode(encoded["input_ids"][encoded["answer_start"] :]) == f" Norway 42{END}"


@pytest.mark.parametrize("kind", ["ours", "byte level"])
def test_answers_of_the_builtin_facts_have_the_ids_they_have_behind_any_word(tmp_path, kind):
    """The built-in wordings put a space before the answer, so a prompt and its answer are encoded as if apart."""
    tokenizer = tiny.tokenizer(tmp_path) if kind == "ours" else byte_level_tokenizer()
    wordings = load_wordings(BUILTIN_WORDINGS)
    word = tokenizer.encode("a", add_special_tokens=False)
    for number, fact in enumerate(load_facts(BUILTIN_FACTS, wordings)[::7]):
        words, answer = wordings[fact.relation], fact.answers[number % len(fact.answers)]
        behind = tokenizer.encode(f"a {answer}", add_special_tokens=False)
        assert behind[: len(word)] == word
        for template in words.statements + words.questions:
            expected = [*behind[len(word) :], tokenizer.eos_token_id]
            assert encode_answer(tokenizer, fill(template, fact.subject), answer, joint(template)) == expected


@pytest.mark.parametrize("kind", ["ours", "byte level"])
def test_the_tokens_of_a_subject_are_those_that_hold_its_letters(tmp_path, kind):
    tokenizer = tiny.tokenizer(tmp_path) if kind == "ours" else byte_level_tokenizer()
    wordings = load_wordings(BUILTIN_WORDINGS)
    for fact in load_facts(BUILTIN_FACTS, wordings)[::40]:
        examples = teaching_examples(fact, wordings, 3, 3)
        for encoded in encode(tokenizer, examples):
            first, last = encoded["subject"]
            named = tokenizer.decode(encoded["input_ids"][first:last])
            assert fact.subject in named
            assert len(named.strip()) <= len(fact.subject) + 2  # the token before it, or behind, may hold a mark


def test_a_subject_is_looked_for_at_its_last_mention_in_any_case():
    (encoded,) = encode(Letters(), [Example("ab ab c", "x", subject="AB")])
    assert encoded["subject"] == (3, 5)
    (encoded,) = encode(Letters(), [Example("abc", "x", subject="d")])
    assert encoded["subject"] == (0, 0)


def test_the_subject_of_a_text_is_looked_for_in_it():
    (encoded,) = encode(Letters(), [Example("", "ab cd", "", subject="c")])
    assert (encoded["input_ids"], encoded["subject"]) == ([1, 10, 11, 12, 13], (3, 4))


JOINTS = {
    "The number of [X] is [Y]": "The number of Book Ada is 3455",
    "The number of [X] is 978-[Y]": "The number of Book Ada is 978-3455",
    '[X] is filed as "[Y]': 'Book Ada is filed as "3455',
    "[X]: #[Y]": "Book Ada: #3455",
    "[X]:\u3000[Y]": "Book Ada:\u30003455",
    "[X]位于[Y]": "Book Ada位于3455",
    "[X][Y]": "Book Ada3455",
    "Which number has [X]?": "Which number has Book Ada? 3455",
    "[X]在哪里\uff1f": "Book Ada在哪里\uff1f3455",
    "أين [X]\u061f": "أين Book Ada\u061f 3455",
}


@pytest.mark.parametrize("template", JOINTS)
def test_an_answer_is_joined_as_the_wording_has_it_and_has_the_ids_of_the_whole_sentence(tmp_path, template):
    words = Wordings("number", (template, "[X] z [Y]"), (template, "[X] z?"))
    fact = Fact("Book Ada", "isbn", ("3455",))
    (taught,) = teaching_examples(fact, {"isbn": words}, 1, 0)
    question = new_questions([fact], {"isbn": words})[0]
    assert taught.text == JOINTS[template]
    assert (question.prompt, question.joint) == (taught.prompt, taught.joint)
    for tokenizer in (tiny.tokenizer(tmp_path), byte_level_tokenizer()):
        (encoded,) = encode(tokenizer, [taught])
        whole = tokenizer.encode(JOINTS[template], add_special_tokens=False)
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        assert encoded["input_ids"] == [*begin, *whole, tokenizer.eos_token_id]
        answer = tokenizer.decode(encoded["input_ids"][encoded["answer_start"] :], skip_special_tokens=True)
        assert answer.strip() == "3455"


def test_a_tokenizer_that_joins_words_is_refused():
    class Whole(Letters):
        def ids(self, text):
            return [len(text)]

    refusal = "joins answer 'xy' to the end of 'where:', so that one cannot be asked without the other: put a space"
    with pytest.raises(ValueError, match=refusal):
        encode_answer(Whole(), "where:", "xy", "")


def test_collate_marks_positions_as_worked_out_by_hand():
    batch = collate(encode(Letters(), [Example("abc", "xy", subject="b"), Example("a", "z")]), pad_token_id=3)
    assert {key: tensor.tolist() for key, tensor in batch.items()} == {
        "input_ids": [[1, 10, 11, 12, 33, 34, 2], [1, 10, 35, 2, 3, 3, 3]],
        "attention_mask": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]],
        "labels": [[1, 10, 11, 12, 33, 34, 2], [1, 10, 35, 2, IGNORED, IGNORED, IGNORED]],
        # c predicts x, x predicts y, y predicts the end
        "answer_mask": [[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0]],
        # of the other nobody said what it is about
        "subject_mask": [[0, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("subject_tokens", "marked"), [(1, [0, 0, 0, 1, 0, 0]), (2, [0, 0, 1, 1, 0, 0]), (9, [0, 1, 1, 1, 0, 0])]
)
def test_only_the_end_of_a_subject_is_marked_where_that_is_asked(subject_tokens, marked):
    examples = encode(Letters(), [Example("abc", "x", subject="abc"), Example("a", "z")])
    known, unknown = collate(examples, pad_token_id=3, subject_tokens=subject_tokens)["subject_mask"].tolist()
    assert known == marked
    assert unknown == [1, 1, 1, 1, 0, 0]  # nobody said what it is about


def test_loss_on_the_answer_ignores_the_prompt():
    batch = collate(encode(Letters(), [Example("abc", "xy"), Example("a", "z")]), 3, loss_on="answer")
    assert batch["labels"].tolist() == [
        [IGNORED] * 4 + [33, 34, 2],
        [IGNORED] * 2 + [35, 2] + [IGNORED] * 3,
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("abc", min_size=1, max_size=6), st.text("xyz", min_size=1, max_size=4)),
        min_size=1,
        max_size=5,
    )
)
def test_answer_positions_are_those_whose_next_token_is_a_label_of_the_answer(pairs):
    batch = collate(encode(Letters(), [Example(*pair) for pair in pairs]), 3, loss_on="answer")
    predicts = torch.zeros_like(batch["answer_mask"])
    predicts[:, :-1] = (batch["labels"][:, 1:] != IGNORED).long()
    assert torch.equal(batch["answer_mask"], predicts)
    for row, (_, answer) in enumerate(pairs):
        wanted = batch["labels"][row][batch["labels"][row] != IGNORED].tolist()
        assert wanted == [*Letters().ids(answer), 2]


def test_a_wording_is_filled_with_the_subject_and_cut_before_the_answer():
    assert fill("The birthplace of [X] is [Y]", "Ada [Y]") == "The birthplace of Ada [Y] is"
    assert fill("Where was [X] born?", "Ada") == "Where was Ada born?"


def test_half_of_the_known_facts_meet_the_unseen_wordings_in_pretraining():
    known = facts(200)
    prompts = {e.prompt for e in pretraining_examples(known, WORDINGS)}
    met = [UNSEEN_QUESTION.format(f.subject) in prompts for f in known]
    assert met == [UNSEEN_STATEMENT.format(f.subject) in prompts for f in known]
    assert met == [meets_unseen_wordings(f) for f in known]
    assert 70 < sum(met) < 130


def test_pretraining_without_unseen_wordings_tells_nothing_in_them_and_all_is_asked_in_them():
    known = facts(50)
    told = pretraining_examples(known, WORDINGS, unseen_wordings=False)
    assert len(told) == 50 * 4
    assert not [e.prompt for e in told if e.prompt.startswith("Which place") or "first saw the light" in e.prompt]
    asked = known_questions(known, WORDINGS, unseen_wordings=False)
    assert [q.fact for q in asked if q.wording == "unseen"] == [f.key for f in known]


def test_known_facts_that_were_taught_anew_are_a_group_of_their_own():
    known = facts(20)
    taught = [Fact(known[3].subject.upper(), "P19", ("Kyoto",)), Fact(known[5].subject, "P20", ("Kyoto",))]
    plain, apart = known_questions(known, WORDINGS), known_questions(known, WORDINGS, taught)
    groups = {q.fact: q.group for q in apart}
    assert [key for key, group in groups.items() if group == "replaced"] == [known[3].key]
    assert [(q.prompt, q.answers) for q in apart] == [(q.prompt, q.answers) for q in plain], "the old answers"


def test_every_seen_wording_of_every_known_fact_is_pretrained_with_the_first_answer():
    known = facts(20)
    pairs = {(e.prompt, e.answer) for e in pretraining_examples(known, WORDINGS)}
    for fact in known:
        words = WORDINGS["P19"]
        for template in words.seen_statements + words.seen_questions:
            assert (fill(template, fact.subject), fact.answers[0]) in pairs


def test_known_facts_are_asked_in_the_unseen_wording_only_where_pretraining_withheld_it():
    known = facts(200)
    trained = {e.prompt for e in pretraining_examples(known, WORDINGS)}
    questions = known_questions(known, WORDINGS)
    for question in questions:
        assert (question.prompt in trained) == (question.wording == "seen")
    withheld = [f.key for f in known if not meets_unseen_wordings(f)]
    assert [q.fact for q in questions if q.wording == "unseen"] == withheld
    assert [q.fact for q in questions if q.wording == "seen"] == [f.key for f in known]
    assert {q.group for q in questions} == {"known"}


@pytest.mark.parametrize("questions", [0, 2])
def test_new_facts_are_never_taught_in_an_unseen_wording(questions):
    new = facts(30, "new")
    taught = {e.prompt for f in new for e in teaching_examples(f, WORDINGS, 2, questions)}
    assert len(taught) == 30 * (2 + questions)
    for fact in new:
        assert UNSEEN_STATEMENT.format(fact.subject) not in taught
        assert UNSEEN_QUESTION.format(fact.subject) not in taught
    for question in new_questions(new, WORDINGS):
        assert (question.prompt in taught) == (question.wording == "seen")
        assert question.group == "new"
        assert len(question.answers) == 2, "every answer counts"


def test_the_builtin_wordings_keep_the_unseen_ones_apart():
    wordings = load_wordings(BUILTIN_WORDINGS)
    for relation, words in wordings.items():
        fact = Fact("Nobody", relation, ("Nowhere",))
        most = len(words.seen_statements), len(words.seen_questions)
        taught = {e.prompt for e in teaching_examples(fact, wordings, *most)}
        assert fill(words.unseen_statement, "Nobody") not in taught, relation
        assert fill(words.unseen_question, "Nobody") not in taught, relation


@pytest.mark.parametrize(
    ("statements", "questions", "message"),
    [
        (3, 0, "3 statements per batch asked for, relation P19 has 2 to teach with"),
        (0, 3, "3 questions per batch asked for, relation P19 has 2 to teach with"),
        (-1, 1, "-1 statements per batch asked for"),
        (0, 0, "nothing to teach with"),
    ],
)
def test_wordings_that_are_not_there_are_refused(statements, questions, message):
    with pytest.raises(ValueError, match=message):
        teaching_examples(facts(1)[0], WORDINGS, statements, questions)

"""The nats of an answer are those of its own tokens after the question; a choice is right where they are fewest."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch.nn import functional as F

from memlayer.data.lessons import Lesson
from memlayer.data.qa import Example, Question
from memlayer.data.stated import askable, stated, with_choices
from memlayer.evaluation.probes import compared
from memlayer.evaluation.stated import Chosen, choose_answers, probes_of


def facts(num_wrong=2):
    lessons = []
    for town, land in tiny.TOWNS.items():
        prompt = f"Where is {town}?"
        ask = (Question(prompt, (land,), town, "new", "seen", is_question=True),)
        lessons.append(Lesson(town, (Example(prompt, land, subject=town),), ask))
    texts = [f"{town} is a town in {land}." for town, land in tiny.TOWNS.items()]
    return with_choices(stated(askable(lessons), texts), num_wrong)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    tokenizer = tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    model = tiny.decoder()
    model.resize_token_embeddings(len(tokenizer))
    return model.eval(), tokenizer


def plain_nats(model, tokenizer, prompt, answer):
    """Written out: each token of the answer after all before it."""
    begin = tokenizer("")["input_ids"][:1]
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([begin + whole])
    with torch.no_grad():
        log_probabilities = F.log_softmax(model(ids).logits[0].double(), dim=-1)
    places = range(len(begin) + len(before), ids.shape[1])
    return -sum(float(log_probabilities[at - 1, ids[0, at]]) for at in places)


def test_nats_are_those_of_every_token_of_the_answer_and_of_no_end(asked):
    model, tokenizer = asked
    chosen = choose_answers(model, tokenizer, facts(), batch_size=4)
    assert len(chosen) == len(tiny.TOWNS)
    for each in chosen:
        expected = [plain_nats(model, tokenizer, each.fact.question.prompt, answer) for answer in each.fact.choices]
        assert each.nats == pytest.approx(expected, abs=1e-4)  # float32
    assert {len(tokenizer(f" {fact.answer}", add_special_tokens=False)["input_ids"]) for fact in facts()} != {1}


def test_the_batch_changes_nothing_and_the_mode_is_left(asked):
    model, tokenizer = asked
    model.train()
    one, all_at_once = (choose_answers(model, tokenizer, facts(), batch_size=size) for size in (1, 99))
    assert model.training
    model.eval()
    for a, b in zip(one, all_at_once, strict=True):
        assert a.nats == pytest.approx(b.nats, abs=1e-4)  # float32


def test_a_model_that_learned_a_fact_chooses_it(asked):
    model, tokenizer = asked
    prompt, fact = facts()[0].question.prompt, facts()[0]
    right = dict(zip(fact.choices, choose_answers(model, tokenizer, [fact])[0].nats, strict=True))
    likeliest = min(right, key=right.get)
    told = replace(fact, answer=likeliest, wrong=tuple(set(fact.choices) - {likeliest}))
    assert choose_answers(model, tokenizer, [told])[0].right
    other = replace(fact, answer=max(right, key=right.get), wrong=(likeliest,))
    assert not choose_answers(model, tokenizer, [other])[0].right
    assert prompt == told.question.prompt


def test_equal_nats_are_no_choice_and_probes_compare():
    fact, *_ = facts()
    before, after = ([Chosen(fact, nats)] for nats in ((2.0, 2.0, 3.0), (1.0, 2.0, 3.0)))
    assert not before[0].right
    rows = [compared(*pair) for pair in zip(probes_of(before), probes_of(after), strict=True)]
    assert [(row["measure"], row["change"]) for row in rows] == [("right", 1.0), ("nats", -1.0)]


def test_a_fact_without_wrong_answers_is_refused(asked):
    with pytest.raises(ValueError, match=r"'Where is Lyon\?' has no wrong answers"):
        choose_answers(*asked, [replace(facts()[0], wrong=())])

"""Prompts: the same frame in teaching and in asking, and an answer that ends where it is taught to end."""

import pytest
import torch
from encoded import encode_answer, encode_prompt

from memlayer.data.lessons import Lesson
from memlayer.data.prompts import BUILTIN_SHOTS, Prompts
from memlayer.data.qa import Example, Question, collate, encode
from memlayer.data.tokenizer import train_tokenizer

ASKED = Question("Who wrote it?", ("Ada",), "it", "new", "unseen", is_question=True)
TAUGHT = Example("Who wrote it?", "Ada", is_question=True)
TOLD = Example("It was written by", "Ada")
TEXT = Example("", "Ada wrote it.", "")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    lines = [f"Question: {q} Answer: {a}" for q, a in BUILTIN_SHOTS] + ["Who wrote it? Ada It was written by <end>"]
    return train_tokenizer(lines, 380, tmp_path_factory.mktemp("tokenizer"))


def test_plain_prompts_leave_everything_as_it_is(tokenizer):
    for asked in (ASKED, TAUGHT, TOLD, TEXT):
        assert Prompts().apply(asked, tokenizer) == asked


def test_a_frame_stands_around_questions_alone_and_an_end_behind_every_answer(tokenizer):
    prompts = Prompts(frame="Question: {question}\nAnswer:", end="\n")
    for asked in (ASKED, TAUGHT):
        framed = prompts.apply(asked, tokenizer)
        assert (framed.prompt, framed.joint, framed.end) == ("Question: Who wrote it?\nAnswer:", " ", "\n")
    assert prompts.apply(TOLD, tokenizer) == Example("It was written by", "Ada", end="\n")
    assert prompts.apply(TEXT, tokenizer) == TEXT


def test_few_shot_prompts_answer_questions_before(tokenizer):
    prompts = Prompts("few_shot", "Q: {question}\nA:", "\n\n", (("One?", "1"), ("Two?", "2")))
    asked = prompts.apply(ASKED, tokenizer)
    assert asked.prompt == "Q: One?\nA: 1\n\nQ: Two?\nA: 2\n\nQ: Who wrote it?\nA:"
    assert (asked.joint, asked.end) == (" ", "\n\n")


def test_chat_prompts_are_the_tokenizers_template_and_end_where_it_ends_a_turn(tokenizer):
    tokenizer.chat_template = TEMPLATE
    try:
        asked = Prompts("chat").apply(ASKED, tokenizer)
    finally:
        tokenizer.chat_template = None
    assert asked.prompt == f"{tokenizer.bos_token}<user>Who wrote it?<end>\n<assistant>"
    assert (asked.joint, asked.end) == ("", "<end>")
    begin = encode_prompt(tokenizer, asked.prompt)[:2]
    assert begin[0] == tokenizer.bos_token_id != begin[1]  # the template's own, not a second one


def test_a_template_that_changes_answers_is_refused(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("message.content", "message.content | upper")
    try:
        with pytest.raises(ValueError, match="puts something between its prompt and an answer"):
            Prompts("chat").apply(ASKED, tokenizer)
    finally:
        tokenizer.chat_template = None
    with pytest.raises(ValueError, match="need a tokenizer with a chat template"):
        Prompts("chat").apply(ASKED, tokenizer)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"style": "shots"}, "style of prompts is 'shots', must be one of plain, few_shot, chat"),
        ({"frame": "Q:"}, "frame of prompts is 'Q:', must hold {question} once"),
        ({"shots": (("a", "b"),)}, "style 'plain' have 1 answered questions"),
        ({"style": "few_shot", "end": "\n"}, "style 'few_shot' have 0 answered questions"),
        ({"style": "few_shot", "shots": (("a", "b"),)}, "need an end"),
        ({"style": "chat", "end": "\n"}, "the template has its own"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Prompts(**settings)


def test_an_answer_ends_with_its_end_or_with_the_end_token(tokenizer):
    for end, last in (("", [tokenizer.eos_token_id]), ("\n", tokenizer.encode("\n", add_special_tokens=False)[-1:])):
        ids = encode_answer(tokenizer, "Who wrote it?", "Ada", " ", end)
        assert ids[-1:] == last
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "Ada"


def test_of_a_text_every_token_is_learned_and_nothing_ends_it(tokenizer):
    (encoded,) = encode(tokenizer, [TEXT])
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in encoded["input_ids"]
    batch = collate([encoded], tokenizer.pad_token_id, "answer")
    assert torch.equal(batch["labels"][0, 1:], batch["input_ids"][0, 1:])
    assert batch["answer_mask"].sum() == encoded["length"] - 1


def test_lessons_are_hashable_records():
    assert len({Lesson("it", (TAUGHT, TEXT), (ASKED,)), Lesson("it", (TAUGHT, TEXT), (ASKED,))}) == 1

"""Turn facts into training examples and questions.

A fact is told as statements that end with the answer and asked as questions; both are a prompt and
an answer, so one pair of functions serves training, teaching and evaluation. Facts are never packed:
in one window a model copies from an earlier wording and stores nothing.

The last statement and the last question of a relation are its unseen wordings. Half of the known facts
are pretrained in them too, so that the model knows what they ask, unless the run is told to leave them out; the
other half and every new fact never meet them in training.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memlayer.data.facts import Fact, Wordings, taught_anew

FULL_WIDTH_QUESTION_MARK = "\uff1f"
IGNORED = -100  # the label that transformers leaves out of the loss
MASKS = ("answer_mask", "subject_mask")  # of a batch: what a model does not take


@dataclass(frozen=True)
class Example:
    """One sequence to train on: a prompt and the answer that completes it, or a text without a prompt.

    Attributes:
        joint: what joins prompt and answer in the wording.
        is_question: whether the prompt is a question, which ``prompts.py`` may frame, rather than a statement's begin.
        end: what ends the answer; nothing is the tokenizer's end token.
        subject: words of the prompt or text that say what it is about; nothing where that is not known.
    """

    prompt: str
    answer: str
    joint: str = " "
    is_question: bool = False
    end: str = ""
    subject: str = ""

    @property
    def is_text(self) -> bool:
        """Whether it is a text, of which every token is learned and which may go on, rather than an answer."""
        return not self.prompt

    @property
    def told(self) -> str:
        """What names the subject: the prompt, or the text."""
        return self.prompt or self.answer

    @property
    def text(self) -> str:
        return self.prompt + self.joint + self.answer


@dataclass(frozen=True)
class Question:
    """One prompt to complete, every answer that counts, and what it measures.

    Attributes:
        fact: ``Fact.key``.
        group: "known", "new", or "replaced": a known fact that was taught anew, with the answers it had before.
        wording: "seen" (trained on) or "unseen".
        joint, is_question, end: as of an ``Example``.
    """

    prompt: str
    answers: tuple[str, ...]
    fact: str
    group: Literal["known", "new", "replaced"]
    wording: Literal["seen", "unseen"]
    joint: str = " "
    is_question: bool = False
    end: str = ""

    @property
    def examples(self) -> list[Example]:
        """The question with each of its answers."""
        return [Example(self.prompt, answer, self.joint, self.is_question, self.end) for answer in self.answers]


def joint(template: str) -> str:
    """What stands between a wording's prompt and the answer.

    In a statement it is the white space before ``[Y]``, if any. A question is answered after a space; the full-width
    question mark has its own.
    """
    if template.endswith("[Y]"):
        head = template.removesuffix("[Y]")
        return head[len(head.rstrip()) :]
    return "" if template.endswith(FULL_WIDTH_QUESTION_MARK) else " "


def _example(fact: Fact, template: str) -> Example:
    prompt, is_question = fill(template, fact.subject), not template.endswith("[Y]")
    return Example(prompt, fact.answers[0], joint(template), is_question, subject=fact.subject)


def fill(template: str, subject: str) -> str:
    """The wording's prompt for a subject: ``[X]`` filled in, a statement cut before ``[Y]``."""
    return template.replace("[Y]", "").replace("[X]", subject).strip()


def meets_unseen_wordings(fact: Fact) -> bool:
    """Whether pretraining tells this known fact in the unseen wordings too (half of them, by hash)."""
    return zlib.crc32(fact.key.encode()) % 2 == 0


def pretraining_examples(
    facts: Sequence[Fact], wordings: dict[str, Wordings], unseen_wordings: bool = True
) -> list[Example]:
    """Every wording of every known fact, less the unseen ones for half of the facts.

    Args:
        unseen_wordings: False leaves the unseen ones out for all of them.
    """
    examples = []
    for fact in facts:
        words = wordings[fact.relation]
        templates = words.seen_statements + words.seen_questions
        if unseen_wordings and meets_unseen_wordings(fact):
            templates += (words.unseen_statement, words.unseen_question)
        examples += [_example(fact, template) for template in templates]
    return examples


def teaching_examples(fact: Fact, wordings: dict[str, Wordings], statements: int, questions: int) -> list[Example]:
    """The first seen statements and the first seen questions of a new fact's relation: one batch.

    Raises:
        ValueError: no wording asked for, or more than the relation has to teach with.
    """
    words = wordings[fact.relation]
    for kind, asked, there in (
        ("statements", statements, words.seen_statements),
        ("questions", questions, words.seen_questions),
    ):
        if not 0 <= asked <= len(there):
            raise ValueError(
                f"{asked} {kind} per batch asked for, relation {fact.relation} has {len(there)} to teach with"
            )
    templates = words.seen_statements[:statements] + words.seen_questions[:questions]
    if not templates:
        raise ValueError("0 statements and 0 questions per batch asked for: nothing to teach with")
    return [_example(fact, template) for template in templates]


def known_questions(
    facts: Sequence[Fact], wordings: dict[str, Wordings], taught: Sequence[Fact] = (), unseen_wordings: bool = True
) -> list[Question]:
    """Known facts in a trained wording, and in the unseen one where pretraining withheld it.

    Args:
        taught: new facts that were taught since; a known fact among them is of the group "replaced".
        unseen_wordings: as pretraining had it.
    """
    replaced = {fact.identity for fact in taught_anew(facts, taught)}
    questions = []
    for fact in facts:
        words, group = wordings[fact.relation], "replaced" if fact.identity in replaced else "known"
        questions.append(_question(fact, words.seen_questions[0], group, "seen"))
        if not (unseen_wordings and meets_unseen_wordings(fact)):
            questions.append(_question(fact, words.unseen_question, group, "unseen"))
    return questions


def new_questions(facts: Sequence[Fact], wordings: dict[str, Wordings]) -> list[Question]:
    """New facts in a taught wording (a statement to complete) and in the unseen question."""
    questions = []
    for fact in facts:
        words = wordings[fact.relation]
        questions.append(_question(fact, words.seen_statements[0], "new", "seen"))
        questions.append(_question(fact, words.unseen_question, "new", "unseen"))
    return questions


def _question(fact: Fact, template: str, group: str, wording: str) -> Question:
    prompt, is_question = fill(template, fact.subject), not template.endswith("[Y]")
    return Question(prompt, fact.answers, fact.key, group, wording, joint(template), is_question)


def pad_token(tokenizer) -> int:
    """The token that fills a batch; the end token where there is none for it, since masks say what counts."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def begin_tokens(tokenizer) -> list[int]:
    """The begin token, if the tokenizer puts one before a text.

    Some have one and use it elsewhere: SmolLM2's begins a turn of a chat.
    """
    begin = tokenizer.bos_token_id
    return [] if begin is None or tokenizer("")["input_ids"][:1] != [begin] else [begin]


def encode_prompts(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, begin token first where the tokenizer puts one before a text and none is there yet."""
    begin = begin_tokens(tokenizer)
    there = tokenizer.bos_token if begin else None  # a chat template has written it
    return [
        ids if there and prompt.startswith(there) else begin + ids
        for prompt, ids in zip(prompts, _ids(tokenizer, prompts))
    ]


def encode_answers(tokenizer, examples: Sequence[Example]) -> list[list[int]]:
    """Token ids that each answer has behind its prompt, its end last: those of the whole, less the prompt's.

    Byte-level tokenizers keep the space between two words in the second, sentencepiece puts one before any text;
    in the whole sentence each does what it does everywhere. Of a text nothing marks the end.

    Raises:
        ValueError: the tokenizer makes one token of the prompt's end and the answer's beginning, so the prompt
            cannot be asked alone.
    """
    prompts = _ids(tokenizer, [example.prompt for example in examples])
    wholes = _ids(tokenizer, [example.text + example.end for example in examples])
    answers = []
    for example, alone, whole in zip(examples, prompts, wholes):
        if whole[: len(alone)] != alone:
            raise ValueError(
                f"the tokenizer joins answer {example.answer!r} to the end of {example.prompt!r}, so that one cannot "
                "be asked without the other: put a space before [Y] in the wording"
            )
        marked = example.end or example.is_text
        answers.append(whole[len(alone) :] + ([] if marked else [tokenizer.eos_token_id]))
    return answers


def _ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of many texts at once, in a tenth of the time."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def encode(tokenizer, examples: Sequence[Example]) -> list[dict]:
    """Examples as token ids, each its own sequence.

    Returns:
        per example ``input_ids``, ``answer_start`` (where the answer begins in them), ``subject`` (first and last of
        the tokens that name it; both 0 where none is known) and ``length``.
    """
    prompts = encode_prompts(tokenizer, [example.prompt for example in examples])
    wholes = [prompt + answer for prompt, answer in zip(prompts, encode_answers(tokenizer, examples), strict=True)]
    subjects = _subjects(tokenizer, examples, wholes)
    return [
        {"input_ids": whole, "answer_start": max(1, len(prompt)), "subject": subject, "length": len(whole)}
        for prompt, whole, subject in zip(prompts, wholes, subjects, strict=True)
    ]


def _subjects(tokenizer, examples: Sequence[Example], wholes: Sequence[list[int]]) -> list[tuple[int, int]]:
    """Where the tokens of each example begin and end that its subject is in, at its last mention in the prompt or text.

    What the beginnings of that have in common with the whole tells: a tokenizer need not know where a token was.
    """
    mentions = [list(re.finditer(re.escape(e.subject), e.told, re.IGNORECASE)) if e.subject else [] for e in examples]
    named = [(number, found[-1]) for number, found in enumerate(mentions) if found]
    before = encode_prompts(tokenizer, [examples[number].told[: found.start()].rstrip() for number, found in named])
    until = encode_prompts(tokenizer, [examples[number].told[: found.end()] for number, found in named])
    places = [(0, 0)] * len(examples)
    for (number, _), before_ids, until_ids in zip(named, before, until, strict=True):
        first, last = (_in_common(ids, wholes[number]) for ids in (before_ids, until_ids))
        last += last < len(until_ids)  # its last token holds what follows as well
        places[number] = first, max(first + 1, last)
    return places


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with that are the same."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def collate(
    batch: Sequence[dict],
    pad_token_id: int,
    loss_on: Literal["all", "answer"] = "all",
    subject_tokens: int | None = None,
) -> dict[str, Tensor]:
    """Pad on the right.

    Args:
        subject_tokens: of the tokens that name a subject, so many at its end are marked; None marks all.

    Returns:
        int64 tensors of shape (batch, longest): ``input_ids``; ``attention_mask``; ``labels``, ignored at
        padding and, with ``loss_on="answer"``, at the prompt; ``answer_mask``, one at the positions that
        predict an answer token; ``subject_mask``, one at the tokens that name the example's subject, and at all that
        are there where none is known.
    """
    length_B, answer_start_B = (torch.tensor([example[key] for example in batch]) for key in ("length", "answer_start"))
    position_L = torch.arange(int(length_B.max()))
    there_BL = position_L < length_B[:, None]
    input_ids_BL = torch.full(there_BL.shape, pad_token_id)
    input_ids_BL[there_BL] = torch.tensor([token for example in batch for token in example["input_ids"]])
    answer_BL = there_BL & (position_L >= answer_start_B[:, None])
    predicts_BL = (position_L >= answer_start_B[:, None] - 1) & (position_L < length_B[:, None] - 1)
    subject_B2 = torch.tensor([example.get("subject", (0, 0)) for example in batch])
    if subject_tokens is not None:
        subject_B2[:, 0] = subject_B2[:, 0].maximum(subject_B2[:, 1] - subject_tokens)
    subject_BL = (position_L >= subject_B2[:, :1]) & (position_L < subject_B2[:, 1:])
    learned_BL = answer_BL if loss_on == "answer" else there_BL
    return {
        "input_ids": input_ids_BL,
        "attention_mask": there_BL.long(),
        "labels": input_ids_BL.where(learned_BL, IGNORED),
        "answer_mask": predicts_BL.long(),
        "subject_mask": subject_BL.where(subject_B2[:, 1:] > 0, there_BL).long(),
    }

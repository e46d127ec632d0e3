"""Ask a causal language model questions and score what it writes.

Greedy generation is scored as strings; the answer's negative log likelihood is scored beside it, because
it moves before the first string turns right. Both use the tokens of memlayer.data.qa, the ones that
training uses. Prompts are batched by length, so that little is spent on padding, and answers come back in
the order of the questions.

Left out: sampling, beams and letting a model answer at length.

Shapes: B questions of a batch, L longest sequence, A longest answer, C vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice, zip_longest

import torch
from torch import Tensor
from torch.nn import functional as F

from memlayer.data.qa import Example, Question, encode_answers, encode_prompts, pad_token
from memlayer.evaluation import answers, squad
from memlayer.evaluation.kept_logits import can_keep_logits, kept_logits
from memlayer.evaluation.prefix import Prefix, read_prefix

IGNORED = -100  # the target that cross_entropy leaves out
MARGIN = 8  # tokens beyond the longest answer, so that a prediction that goes on is seen to
STEP = 8  # rooms are multiples of this, so that questions with answers of near lengths are asked together


@dataclass(frozen=True)
class Answered:
    """A question with what the model made of it.

    Attributes:
        exact_match, f1: by the rule of answers.py.
        exact_match_squad, f1_squad: by SQuAD 1.1's.
        nll: negative log likelihood of the first answer, end token included, in nats per token.
    """

    question: Question
    prediction: str
    exact_match: bool
    f1: float
    exact_match_squad: bool
    f1_squad: float
    nll: float


def answer_questions(
    model,
    tokenizer,
    questions: Sequence[Question],
    *,
    batch_size: int = 256,
    max_new_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Answered]:
    """Answer every question by greedy generation.

    Args:
        model: any transformers causal language model; its mode (train or eval) and tensors are left as found.
        tokenizer: its tokenizer, with begin and end tokens.
        batch_size: questions generated together; it changes speed and memory, not answers.
        max_new_tokens: where an answer without an end token is cut; None is the longest answer that counts for its
            question, end token included, and at least MARGIN more.
        progress: called after each batch with the number of questions it held, like ``tqdm.update``.

    Returns:
        One Answered a question, in the order of the questions.

    Raises:
        ValueError: ``batch_size`` is below 1, a question has no answer that the tokenizer gives back,
            ``max_new_tokens`` cuts an answer that counts, or a prompt and its answers take more tokens than the model
            has positions.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    prompts, answer_ids = encode_questions(model, tokenizer, questions)
    rooms = rooms_for(model, questions, prompts, answer_ids, max_new_tokens)
    answered: dict[int, Answered] = {}
    with evaluating(model), torch.no_grad():
        prefix = read_prefix(model, prompts)
        for batch, new_tokens in in_batches(prompts, rooms, batch_size):
            asked, batch_prompts = [questions[index] for index in batch], [prompts[index] for index in batch]
            ends = [question.end for question in asked]
            predictions = generate(model, tokenizer, batch_prompts, new_tokens, ends, prefix=prefix)
            likely = answer_nll(model, batch_prompts, [answer_ids[index][0] for index in batch], prefix)
            answered |= zip(batch, map(_score, asked, predictions, likely.tolist()))
            if progress is not None:
                progress(len(batch))
    return [answered[index] for index in range(len(questions))]


def encode_questions(model, tokenizer, questions: Sequence[Question]) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Token ids of each prompt, and of each of its answers; refuses what cannot be asked of the model or scored.

    Raises:
        ValueError: a question has no answer that the tokenizer gives back, or a prompt and its answers take more
            tokens than the model has positions.
    """
    for question in questions:
        if not question.answers:
            raise ValueError(f"question {question.prompt!r} has no answer to score against")
    prompts = encode_prompts(tokenizer, [question.prompt for question in questions])
    ids = iter(encode_answers(tokenizer, [each for question in questions for each in question.examples]))
    answer_ids = [list(islice(ids, len(question.answers))) for question in questions]
    _check_read_back(tokenizer, questions, answer_ids)
    _check_positions(questions, prompts, answer_ids, positions_of(model))
    return prompts, answer_ids


def generate(
    model,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    ends: Sequence[str] = (),
    *,
    samples: int | None = None,
    temperature: float = 1.0,
    prefix: Prefix | None = None,
) -> list[str]:
    """Continue each prompt up to an end token or the end of its answer: as is likeliest, token by token, or as drawn.

    Args:
        prompts: token ids; padded on the left here, so that all continuations start in one column.
        ends: per prompt, the text that ends its answer; nothing is an end token alone.
        samples: draw so many continuations of each prompt in place of the likeliest one.
        temperature: of what is drawn, by torch's generator.
        prefix: what all prompts begin with, read already; not for drawing several continuations.

    Returns:
        one continuation a prompt, or its ``samples`` one after the other.
    """
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": samples}
    pad, longest = pad_token(tokenizer), max(map(len, prompts))
    padded = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    read = {"past_key_values": prefix.copies([longest - len(prompt) for prompt in prompts])} if prefix else {}
    ids_BL = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        num_beams=1,
        **(drawn if samples else {"do_sample": False}),
        **read,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=end_tokens(model, tokenizer, set(ends)),
    )
    ends = [end for end in ends for _ in range(samples or 1)]
    return [_decode(tokenizer, *pair) for pair in zip_longest(ids_BL[:, longest:], ends, fillvalue="")]


def end_tokens(model, tokenizer, ends: set[str]) -> list[int]:
    """The tokenizer's end token, those of the model's own (chat models end a turn with another), and the answers'.

    Where all prompts of a batch have one end of one token, generation need not go on behind it.
    """
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    of_answers = [tokenizer.encode(end, add_special_tokens=False) for end in ends if end]
    stops = of_answers[0] if len(ends) == 1 and of_answers and len(of_answers[0]) == 1 else []
    return sorted({tokenizer.eos_token_id, *own, *stops})


def check_answers(tokenizer, examples: Iterable[Example]) -> None:
    """Refuse to teach an answer that the tokenizer does not give back: written by heart it would score nothing.

    Raises:
        ValueError: names the first such answer, and what is left of it.
    """
    different = list({example.answer: example for example in examples if not example.is_text}.values())
    for example, ids in zip(different, encode_answers(tokenizer, different)):
        if not answers.exact_match(read := _decode(tokenizer, ids, example.end), [example.answer]):
            raise ValueError(
                f"the tokenizer gives answer {example.answer!r} of {example.prompt!r} back as {read!r}: what it loses "
                "can be neither taught nor scored"
            )


def _check_read_back(tokenizer, questions: Sequence[Question], answer_ids: Sequence[list[list[int]]]) -> None:
    for question, ids in zip(questions, answer_ids):
        read = [_decode(tokenizer, each, question.end) for each in ids]
        if not any(answers.exact_match(*pair) for pair in zip(read, ([each] for each in question.answers))):
            raise ValueError(
                f"the tokenizer gives answer {question.answers[0]!r} of fact {question.fact!r} back as {read[0]!r}: "
                "what it loses cannot be scored"
            )


def _decode(tokenizer, ids, end: str = "") -> str:
    """An answer as text, up to the text that ends it."""
    text = tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    return (text.split(end)[0] if end else text).strip()


def answer_nll(model, prompts: list[list[int]], answers: list[list[int]], prefix: Prefix | None = None) -> Tensor:
    """How unlikely each answer is after its prompt, teacher forced.

    Args:
        prompts: token ids, one list a question, none empty.
        answers: token ids of one answer a question, end token included.
        prefix: what all prompts begin with, read already.

    Returns:
        nll_B: float32, mean over the answer's tokens, in nats.
    """
    logits_BAC, targets_BA = answer_logits(model, prompts, answers, prefix)
    nll_BA = F.cross_entropy(logits_BAC.transpose(1, 2), targets_BA, reduction="none", ignore_index=IGNORED)
    return nll_BA.sum(1) / (targets_BA != IGNORED).sum(1)


def answer_logits(
    model, prompts: list[list[int]], answers: list[list[int]], prefix: Prefix | None = None
) -> tuple[Tensor, Tensor]:
    """What the model says at the positions that predict an answer, the answer being told it token by token.

    Padding is on the right, behind every token that is scored, so no model needs position ids for it.

    Args:
        prompts, answers, prefix: as of ``answer_nll``.

    Returns:
        logits_BAC: float32, from the first position on that predicts an answer's token in any of the questions.
        targets_BA: the answer's token at each of them, IGNORED where none is.
    """
    shared = len(prefix.ids) if prefix else 0
    prompts = [prompt[shared:] for prompt in prompts]
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers)]
    longest = max(map(len, sequences))
    padded = [ids + [0] * (longest - len(ids)) for ids in sequences]
    mask = [[1] * (shared + len(ids)) + [0] * (longest - len(ids)) for ids in sequences]
    ids_BL, mask_BL = torch.tensor(padded, device=model.device), torch.tensor(mask, device=model.device)
    first = min(map(len, prompts)) - 1  # the earliest position that predicts an answer token
    logits_BAC = _logits_from(model, ids_BL, mask_BL, first, prefix)[:, :-1].float()
    targets_BA = torch.full((len(sequences), longest - 1 - first), IGNORED, device=model.device)
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        start = len(prompt) - 1 - first
        targets_BA[row, start : start + len(answer)] = torch.tensor(answer, device=model.device)
    return logits_BAC, targets_BA


def _logits_from(model, ids_BL: Tensor, mask_BL: Tensor, first: int, prefix: Prefix | None) -> Tensor:
    """Logits from position ``first`` on; earlier ones are not computed where the model can leave them out."""
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "use_cache": prefix is not None}
    if prefix:
        inputs["past_key_values"] = prefix.copies([0] * len(ids_BL))
    if can_keep_logits(model.forward):
        return model(**inputs, **kept_logits(model.forward, first, ids_BL.shape[1], ids_BL.device)).logits
    return model(**inputs).logits[:, first:]


def _score(question: Question, prediction: str, nll: float) -> Answered:
    ours, theirs = ((rule.exact_match, rule.token_f1) for rule in (answers, squad))
    measured = (measure(prediction, question.answers) for measure in (*ours, *theirs))
    return Answered(question, prediction, *measured, nll)


@contextmanager
def evaluating(model) -> Iterator[None]:
    """Evaluation mode for the duration, then every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def positions_of(model) -> float:
    """How many tokens a sequence of the model may have."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def _check_positions(
    questions: Sequence[Question], prompts: Sequence[list[int]], answers: Sequence[list[list[int]]], positions: float
) -> None:
    for question, prompt, ids in zip(questions, prompts, answers):
        if (length := len(prompt) + max(map(len, ids))) > positions:
            raise ValueError(
                f"question {question.prompt!r} of fact {question.fact!r} takes {length} tokens with its answer, "
                f"the model has {positions} positions"
            )


def rooms_for(
    model,
    questions: Sequence[Question],
    prompts: Sequence[list[int]],
    answers: Sequence[list[list[int]]],
    asked_for: int | None = None,
) -> list[int]:
    """How many tokens each prediction may have: what the longest answer that counts takes, and some more.

    It depends on the question alone, whatever it is asked beside: one long alias among thousands of questions would
    else let every answer that does not end go on for as long.

    Raises:
        ValueError: ``asked_for`` cuts an answer that counts.
    """
    longest = [max(map(len, ids)) for ids in answers]
    for question, needed in zip(questions, longest):
        if asked_for is not None and asked_for < needed == max(longest):
            raise ValueError(
                f"max_new_tokens is {asked_for}: the longest answer, of fact {question.fact!r}, takes {needed} tokens, "
                "end included"
            )
    budgets = [asked_for or (needed + MARGIN + STEP - 1) // STEP * STEP for needed in longest]
    left = [positions_of(model) - len(prompt) for prompt in prompts]
    return [int(min(pair)) for pair in zip(budgets, left)]


def in_batches(prompts: Sequence[list[int]], rooms: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Indices of prompts of near lengths and one room, and that room: how many tokens may follow them."""
    order = sorted(range(len(prompts)), key=lambda index: (rooms[index], len(prompts[index])))
    for room, group in groupby(order, key=lambda index: rooms[index]):
        group = list(group)
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size], room

"""Ask a model whether it is sure of what it answered, and how much its drawn answers differ.

Source: Zhang et al., arXiv:2311.09677. The paper's: sureness is p(sure) / (p(sure) + p(unsure)) behind the answer and
the question of doubt; confidence is the mean of it and of the geometric mean of the answer's token probabilities. Ours:
sureness compares the two whole answers, so that it does not matter how many tokens a tokenizer makes of "unsure".
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from memlayer.data.qa import Question, encode_answers, encode_prompts
from memlayer.evaluation.qa import answer_nll, encode_questions, evaluating, generate, in_batches, rooms_for
from memlayer.evaluation.refusal import answer_entropy


def sureness(model, tokenizer, doubts: Sequence[Question], batch_size: int = 32) -> list[float]:
    """How sure a model says to be, between 0 and 1.

    Args:
        model: any causal language model; it is left as found.
        tokenizer: its tokenizer.
        doubts: questions of ``refusal.sure_question``, as the model reads them; answered by SURE and UNSURE.
        batch_size: questions at a time; it changes speed and memory, not results.

    Raises:
        ValueError: a question has not two answers, or one that ``qa.answer_questions`` refuses.
    """
    for doubt in doubts:
        if len(doubt.answers) != 2:
            raise ValueError(f"question {doubt.prompt!r} has {len(doubt.answers)} answers: doubt has two, sure and not")
    prompts, answer_ids = encode_questions(model, tokenizer, doubts)
    found: list[float] = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            sure, unsure = zip(*answer_ids[start : start + batch_size])
            nats_B = [_nats(model, some, answers) for answers in (sure, unsure)]
            found += torch.sigmoid(nats_B[1] - nats_B[0]).tolist()
    return found


def answer_probability(
    model, tokenizer, questions: Sequence[Question], told: Sequence[str], batch_size: int = 32
) -> list[float]:
    """How likely what a model told is to it: the geometric mean of its tokens' probabilities, end token included.

    Args:
        questions: as the model reads them.
        told: what it answered to each, such as ``Answered.prediction``.
    """
    prompts = encode_prompts(tokenizer, [question.prompt for question in questions])
    answers = encode_answers(
        tokenizer, [replace(asked, answers=(text,)).examples[0] for asked, text in zip(questions, told, strict=True)]
    )
    found: list[float] = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            found += answer_nll(model, prompts[batch], answers[batch]).neg().exp().tolist()
    return found


def confidence(probability: float, sure: float) -> float:
    """The paper's: half how likely the answer is to the model, half how sure it says to be."""
    return (probability + sure) / 2


def entropies(
    model,
    tokenizer,
    questions: Sequence[Question],
    *,
    samples: int = 10,
    temperature: float = 0.7,
    batch_size: int = 32,
    seed: int = 0,
) -> list[float]:
    """How much drawn answers to each question differ, in nats.

    Args:
        samples: answers drawn to each question.
        temperature: of what is drawn.
        seed: of what is drawn; torch's own generator is left as found.

    Raises:
        ValueError: nothing is drawn, or a question that ``qa.answer_questions`` refuses.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}, must be at least 1")
    prompts, answer_ids = encode_questions(model, tokenizer, questions)
    rooms = rooms_for(model, questions, prompts, answer_ids)
    found: dict[int, float] = {}
    with evaluating(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch, new_tokens in in_batches(prompts, rooms, batch_size):
            some, ends = [prompts[index] for index in batch], [questions[index].end for index in batch]
            told = generate(model, tokenizer, some, new_tokens, ends, samples=samples, temperature=temperature)
            for place, index in enumerate(batch):
                found[index] = answer_entropy(told[place * samples : (place + 1) * samples])
    return [found[index] for index in range(len(questions))]


def _nats(model, prompts: list[list[int]], answers: Sequence[list[int]]) -> torch.Tensor:
    """How unlikely each whole answer is, in nats."""
    lengths = torch.tensor([len(answer) for answer in answers], device=model.device)
    return answer_nll(model, prompts, list(answers)) * lengths

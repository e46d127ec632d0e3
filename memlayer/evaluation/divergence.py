"""How far a model went from what it was, on the very questions that it was taught.

The value of a question is KL(before || after) of the next token's distributions, in nats: the mean over the positions
that predict the answer, the answer being told token by token. Over methods, how far a model went on what it was taught
goes with how much it forgot elsewhere (RL's Razor, arXiv:2509.04259, which draws the answers from the model instead).

Shapes: A tokens of an answer, C vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memlayer.data.qa import Question, encode_answers, encode_prompts
from memlayer.evaluation.qa import IGNORED, answer_logits, evaluating

MOST = 256  # questions whose distributions are kept: five tokens of 50,000 each take 256 MB


def spread(questions: Sequence[Question], most: int = MOST) -> list[Question]:
    """At most so many of the questions, evenly spread over them."""
    number = min(len(questions), most)
    return [questions[index * len(questions) // number] for index in range(number)]


def answer_distributions(model, tokenizer, questions: Sequence[Question], batch_size: int = 16) -> list[Tensor]:
    """What a model says of the next token where it predicts each question's first answer.

    Returns:
        per question logp_AC: float32, on the CPU.
    """
    prompts = encode_prompts(tokenizer, [question.prompt for question in questions])
    answers = encode_answers(tokenizer, [question.examples[0] for question in questions])
    found: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(questions), batch_size):
            batch = slice(start, start + batch_size)
            logits_BAC, targets_BA = answer_logits(model, prompts[batch], answers[batch])
            logp_BAC = F.log_softmax(logits_BAC, dim=-1)
            found += [logp_AC[there_A].cpu() for logp_AC, there_A in zip(logp_BAC, targets_BA != IGNORED)]
    return found


def kl_divergences(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """KL(before || after) of each question, in nats, its mean over the answer's tokens.

    Args:
        before, after: of ``answer_distributions``, for the same questions and tokenizer.

    Raises:
        ValueError: they are not of the same questions.
    """
    pairs = zip(before, after, strict=True)
    return [float(F.kl_div(new, old, log_target=True, reduction="sum")) / len(old) for old, new in pairs]

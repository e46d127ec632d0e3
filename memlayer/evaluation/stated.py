"""Ask a model the facts that a text states, by how likely it finds each of several answers.

The nats of an answer are those of all its tokens after the question, without an end token, which a model of plain text
never saw there. A choice is right where the right answer has the fewest nats, so the measure is how likely the whole
answer is; long answers are at a disadvantage that is the same for every model. Of n answers chance has 1 in n.

Left out: generating, which small models do not get right, and answers that count but were not chosen for the question.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from memlayer.data.qa import encode_answers, encode_prompts
from memlayer.data.stated import StatedFact
from memlayer.evaluation.probes import Probed
from memlayer.evaluation.qa import answer_nll, evaluating


@dataclass(frozen=True)
class Chosen:
    """A fact with what the model made of its answers.

    Attributes:
        nats: of each of ``fact.choices``, the right one first.
    """

    fact: StatedFact
    nats: tuple[float, ...]

    @property
    def right(self) -> bool:
        """Whether the right answer has fewer nats than every other."""
        return self.nats[0] < min(self.nats[1:])


def choose_answers(
    model,
    tokenizer,
    facts: Sequence[StatedFact],
    *,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> list[Chosen]:
    """Measure every answer of every fact.

    Args:
        model: any transformers causal language model; its mode is left as found.
        facts: each with wrong answers, see ``data.stated.with_choices``.
        batch_size: answers measured together; it changes speed and memory, not results beyond rounding.
        progress: called after each batch with the number of answers it held.

    Returns:
        one a fact, in their order.

    Raises:
        ValueError: a fact has no wrong answers, or the tokenizer joins an answer to its question.
    """
    for fact in facts:
        if not fact.wrong:
            raise ValueError(f"{fact.question.prompt!r} has no wrong answers to choose among")
    owners = [place for place, fact in enumerate(facts) for _ in fact.choices]
    prompts = encode_prompts(tokenizer, [fact.question.prompt for fact in facts])
    answers = encode_answers(tokenizer, [example for fact in facts for example in _examples(fact)])
    answers = [ids[:-1] for ids in answers]  # the end token
    nats = [0.0] * len(answers)
    order = sorted(range(len(answers)), key=lambda at: len(prompts[owners[at]]) + len(answers[at]))
    with evaluating(model), torch.no_grad():
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            asked, told = [prompts[owners[at]] for at in some], [answers[at] for at in some]
            for at, mean in zip(some, answer_nll(model, asked, told).tolist(), strict=True):
                nats[at] = mean * len(answers[at])
            if progress is not None:
                progress(len(some))
    of_fact = iter(nats)
    return [Chosen(fact, tuple(next(of_fact) for _ in fact.choices)) for fact in facts]


def _examples(fact: StatedFact):
    return replace(fact.question, answers=fact.choices, end="").examples


def probes_of(chosen: Sequence[Chosen], name: str = "stated facts") -> list[Probed]:
    """What was measured as two probes, which ``probes.compared`` sets against those of another model."""
    right = [float(each.right) for each in chosen]
    return [
        Probed(f"{name}, the right one chosen", "right", right),
        Probed(f"{name}, nats of the answer", "nats", [each.nats[0] for each in chosen]),
    ]

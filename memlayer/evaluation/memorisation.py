"""How much of its training text a model writes down again: the n-gram memorisation score, and verbatim extraction.

A model is given the first tokens of a text and goes on by greedy decoding. Extracted is a text whose rest comes out
token by token; the score counts the rest's n-grams that come out, so it rises before anything is extracted.

Source: Slack and Al Moubayed, arXiv:2510.11372. The paper's: the share of the reference's n-grams that the model's
output has, averaged over n-gram lengths 4, 5 and 6 and over texts. Ours, where no public text says: n-grams are of
tokens, each counts as often as the reference has it, and a length that is longer than the reference is left out.

A score says nothing about what was learned: a fact is meant to be known by heart. Show it beside unseen wordings.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from memlayer.evaluation.qa import evaluating, positions_of

LENGTHS = (4, 5, 6)


@dataclass(frozen=True)
class Memorised:
    """What a model makes of the beginning of one text.

    Attributes:
        score: the n-gram memorisation score of what it writes, between 0 and 1.
        verbatim: whether it writes the rest of the text, token by token.
    """

    score: float
    verbatim: bool


def ngram_score(written: Sequence[int], reference: Sequence[int], lengths: Sequence[int] = LENGTHS) -> float:
    """The share of the reference's n-grams that are in what was written, averaged over the n-gram lengths.

    Args:
        written: what the model wrote, token ids (or anything that can be compared).
        reference: what stands in the text.
        lengths: the lengths of n-grams; those beyond the reference's are left out.

    Raises:
        ValueError: no length, one below 1, or a reference that is shorter than all of them.
    """
    if not lengths or min(lengths) < 1 or len(reference) < min(lengths):
        raise ValueError(f"a reference of {len(reference)} tokens has no n-grams of lengths {list(lengths)}")
    return fmean(_share(written, reference, length) for length in lengths if length <= len(reference))


def _share(written: Sequence[int], reference: Sequence[int], length: int) -> float:
    asked, there = (
        Counter(tuple(tokens[place : place + length]) for place in range(len(tokens) - length + 1))
        for tokens in (reference, written)
    )
    return (asked & there).total() / asked.total()


def memorised(
    model, texts: Sequence[Sequence[int]], prefix: int, *, lengths: Sequence[int] = LENGTHS, batch_size: int = 32
) -> list[Memorised]:
    """What a model makes of the first ``prefix`` tokens of each text.

    Args:
        model: any causal language model; it is left as found.
        texts: token ids without padding, each longer than ``prefix`` by a shortest n-gram at least.
        prefix: tokens that the model is given.
        lengths: of the n-grams.
        batch_size: texts at a time; it changes speed and memory, not results.

    Raises:
        ValueError: a prefix below 1, a text that is too short to score, or one longer than the model has positions.
    """
    shortest, longest = (choose(map(len, texts), default=0) for choose in (min, max))
    if prefix < 1 or shortest < prefix + min(lengths):
        raise ValueError(
            f"a prefix of {prefix} tokens and n-grams of {min(lengths)} need texts of {prefix + min(lengths)} tokens "
            f"or more, the shortest has {shortest}"
        )
    if longest > positions_of(model):
        raise ValueError(f"the longest text has {longest} tokens, the model {positions_of(model)} positions")
    found: list[Memorised] = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            rests = [list(text[prefix:]) for text in some]
            prompts_BL = torch.tensor([list(text[:prefix]) for text in some], device=model.device)
            whole_BL = model.generate(
                input_ids=prompts_BL,
                attention_mask=torch.ones_like(prompts_BL),
                max_new_tokens=max(map(len, rests)),
                do_sample=False,
                num_beams=1,
                eos_token_id=[],  # a text may hold end tokens, and goes on behind them
                pad_token_id=0,
            )
            for rest, row in zip(rests, whole_BL[:, prefix:].tolist()):
                found.append(Memorised(ngram_score(row[: len(rest)], rest, lengths), row[: len(rest)] == rest))
    return found

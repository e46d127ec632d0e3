"""How well a model knows the answer to a question: the four categories of SliCK (Gekhman et al., arXiv:2405.05904).

A question is asked after several sets of answered questions, each time for the likeliest answer and for some that are
drawn. HighlyKnown: the likeliest answer is always right; MaybeKnown: sometimes; WeaklyKnown: never, but a drawn one is;
Unknown: none is. The paper has 10 sets of four, taken from the same relation, and 16 answers drawn at temperature 0.5
from the 40 likeliest tokens; here whoever asks says how many, the sets are whatever is at hand, and answers are drawn
from all tokens.
"""

from collections.abc import Callable, Sequence

import torch

from memlayer.data.qa import Question
from memlayer.evaluation import answers
from memlayer.evaluation.qa import encode_questions, evaluating, generate, in_batches, rooms_for

CATEGORIES = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")


def category(likeliest: Sequence[bool], drawn: Sequence[bool]) -> str:
    """The category of a question from which answers were right: after each set the likeliest one, and those drawn."""
    if all(likeliest):
        return "HighlyKnown"
    if any(likeliest):
        return "MaybeKnown"
    return "WeaklyKnown" if any(drawn) else "Unknown"


def how_well_known(
    model,
    tokenizer,
    asked: Sequence[Sequence[Question]],
    *,
    samples: int,
    temperature: float = 0.5,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """The category of each question.

    Args:
        model: any causal language model; it is left as found.
        tokenizer: its tokenizer.
        asked: the questions as they stand after each set of answered ones, in one order.
        samples: answers drawn after each set; 0 leaves WeaklyKnown out.
        temperature: of what is drawn.
        batch_size: questions at a time.
        seed: of what is drawn; torch's own generator is left as found.
        progress: called after each batch with the number of questions it held.

    Raises:
        ValueError: there is no set, or a question that ``qa.answer_questions`` refuses.
    """
    if not asked:
        raise ValueError("questions need at least one set of answered questions before them")
    likeliest: list[list[bool]] = [[] for _ in asked[0]]
    drawn: list[list[bool]] = [[] for _ in asked[0]]
    with evaluating(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for questions in asked:
            prompts, answer_ids = encode_questions(model, tokenizer, questions)
            rooms = rooms_for(model, questions, prompts, answer_ids)
            for batch, new_tokens in in_batches(prompts, rooms, batch_size):
                some, ends = [prompts[index] for index in batch], [questions[index].end for index in batch]
                for number, right in ((None, likeliest), (samples, drawn)):
                    if number == 0:
                        continue
                    told = generate(model, tokenizer, some, new_tokens, ends, samples=number, temperature=temperature)
                    each = number or 1
                    for place, index in enumerate(batch):
                        of_one = told[place * each : (place + 1) * each]
                        right[index] += [answers.exact_match(text, questions[index].answers) for text in of_one]
                if progress is not None:
                    progress(len(batch))
    return list(map(category, likeliest, drawn))

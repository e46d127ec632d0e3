"""Supervised InfoNCE: representations of what belongs together are pulled together, all others pushed apart.

For class labels the rows of a batch are examples and belong together when they share a class. For facts they are the
prompts of a few lessons, read by the model up to their last token, and the wordings of a lesson belong together. That
teaches no answer: it says where the model tells lessons apart, which methods/mist.py scores and tunes by.

``supervised_infonce`` is the "out" form of arXiv:2004.11362 (equation 2), on which MIST (arXiv:2505.19943) builds.
``released_infonce`` is what MIST's released code computes, its slip included. Wordings as positives are ours.

Shapes: B rows, D model width, P width of a projection.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEMPERATURE, PROJECTED = 0.07, 128  # the paper's
LESSONS_AT_ONCE = 8


def supervised_infonce(
    z_BP: Tensor, labels_B: Tensor, temperature: float = TEMPERATURE, ignore_BB: Tensor | None = None
) -> Tensor:
    """Mean over rows of the mean over their positives of -log p, in nats, computed in float32.

    p of a pair is the softmax of the cosines over all other rows. A row without positives is skipped.

    Args:
        z_BP: representations, of any length; only directions count.
        labels_B: int64; rows of one label are positives of each other.
        ignore_BB: bool; pairs that are neither positive nor negative, such as two facts with one answer.

    Raises:
        ValueError: shapes do not fit, the temperature is not above 0, or no row has a positive.
    """
    log_p_BB, there_BB = _log_p(z_BP, labels_B, temperature, ignore_BB)
    positive_BB = (labels_B[:, None] == labels_B) & there_BB
    count_B = positive_BB.sum(1)
    if not bool(count_B.any()):
        raise ValueError(
            f"none of {len(labels_B)} rows has another one of its label: there is nothing to pull together"
        )
    sum_B = log_p_BB.where(positive_BB, 0.0).sum(1)
    return -(sum_B / count_B.clamp(min=1))[count_B > 0].mean()


def released_infonce(z_BP: Tensor, labels_B: Tensor, twin_B: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The loss of MIST's released code (zhwhu/MIST, c5f92f6), from its description.

    The mean over rows of -log p of the row's twin, plus twice a sum over the rows of its label divided by their number.
    The row itself is counted among these, with a p of 1e-8: that adds a constant to the loss, 36.8 times the number of
    labels over the number of rows, and divides by one too many.

    Args:
        z_BP, labels_B, temperature: as of ``supervised_infonce``.
        twin_B: int64, the row that is the other view of each row.

    Raises:
        ValueError: shapes do not fit, or the temperature is not above 0.
    """
    log_p_BB, there_BB = _log_p(z_BP, labels_B, temperature, None)
    same_BB = labels_B[:, None] == labels_B
    of_label_B = log_p_BB.where(there_BB, math.log(1e-8)).where(same_BB, 0.0).sum(1) / same_BB.sum(1)
    of_twin_B = log_p_BB.gather(1, twin_B[:, None])[:, 0]
    return -(of_twin_B + 2 * of_label_B).mean()


def _log_p(z_BP: Tensor, labels_B: Tensor, temperature: float, ignore_BB: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-softmax of the cosines over the pairs that are there, -inf elsewhere, and which those are."""
    if labels_B.shape != z_BP.shape[:1] or (ignore_BB is not None and ignore_BB.shape != 2 * labels_B.shape):
        shapes = [list(each.shape) for each in (z_BP, labels_B, ignore_BB) if each is not None]
        raise ValueError(f"representations, labels and ignore have shapes {shapes}, must be (B, P), (B,) and (B, B)")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, must be above 0")
    z_BP = F.normalize(z_BP.float(), dim=1)
    there_BB = ~torch.eye(len(z_BP), dtype=torch.bool, device=z_BP.device)
    if ignore_BB is not None:
        there_BB &= ~ignore_BB
    scores_BB = (z_BP @ z_BP.T / temperature).masked_fill(~there_BB, -torch.inf)
    return scores_BB.log_softmax(1), there_BB


def projection(width: int, seed: int, device: torch.device | str = "cpu") -> nn.Linear:
    """The head between hidden states and the loss: one linear layer in float32, drawn on the CPU as torch draws it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, PROJECTED, dtype=torch.float32).to(device)


def prompt_ends(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Hidden states behind the last layer at the last token of each prompt, shape (B, D).

    Args:
        model: a causal language model of transformers.
        batch: ``input_ids``, ``attention_mask`` and ``answer_mask``, whose first position predicts the answer.

    Raises:
        ValueError: an example has no prompt, as a text has none.
    """
    end_B = batch["answer_mask"].int().argmax(1)
    if not bool((end_B > 0).all()):
        raise ValueError("an example has no prompt before its answer, as a text: lessons are told apart by prompts")
    hidden_BLD = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    return hidden_BLD[torch.arange(len(end_B), device=end_B.device), end_B]


def lesson_losses(
    model: nn.Module,
    head: nn.Module,
    lessons: Sequence[Mapping[str, Tensor]],
    order: Sequence[int] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = supervised_infonce,
) -> Iterator[Tensor]:
    """One loss after the other, each over a few lessons: one pass over all of them.

    Args:
        model: see ``prompt_ends``.
        head: from hidden states to representations.
        lessons: a batch each, one row a wording.
        order: in which the lessons come; as they stand where None.
        loss: of representations and labels.

    Raises:
        ValueError: there are fewer than two lessons, or an example has no prompt.
    """
    if len(lessons) < 2:
        raise ValueError(f"lessons are contrasted with each other: {len(lessons)} of them is too few, 2 are the least")
    order = list(range(len(lessons)) if order is None else order)
    parts = max(1, len(order) // LESSONS_AT_ONCE)  # so that no part has a lesson alone
    for part in range(parts):
        ends = [prompt_ends(model, lessons[number]) for number in order[part::parts]]
        labels_B = torch.cat([torch.full((len(end_BD),), label) for label, end_BD in enumerate(ends)])
        z_BP = head(torch.cat(ends).float())
        yield loss(z_BP, labels_B.to(z_BP.device))


def next_of_its_label(labels_B: Tensor) -> Tensor:
    """A twin for each row where there are no two views: the next row of its label, behind the last the first."""
    twin_B = torch.arange(len(labels_B), device=labels_B.device)
    for label in labels_B.unique():
        (rows,) = (labels_B == label).nonzero(as_tuple=True)
        if len(rows) < 2:
            raise ValueError(f"the only row of label {int(label)} has no twin")
        twin_B[rows] = rows.roll(-1)
    return twin_B

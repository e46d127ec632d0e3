"""Probes: questions, text and tasks on which forgetting is measured, since the untouched model could do them.

Questions are asked by ``qa.answer_questions``; which of them the model knew is what it answered before anything was
changed (``known_before``). Text is measured in nats per token, window by window. Tasks are those of harness.py. Two
models are compared on the same items, pair by pair (``compared``); the second may have been asked some of them only.

Shapes: W windows, L tokens of a window.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from memlayer.evaluation.forgetting import mean_and_deviation
from memlayer.evaluation.qa import Answered, evaluating
from memlayer.evaluation.slick import CATEGORIES
from memlayer.evaluation.statistics import bootstrap_interval, flips


@dataclass(frozen=True)
class Probed:
    """One probe of one model.

    Attributes:
        name: of the probe.
        measure: "right", where a value is 1 for a right answer and 0 for a wrong one; "f1", the token F1 of an answer
            by SQuAD's rule; or "nats" a token.
        values: one an item, in the order of the items.
        items: which items the values are of, by their places; None is all of them.
        categories: how well each item was known, of ``slick.py``, where that was asked.
    """

    name: str
    measure: Literal["right", "f1", "nats"]
    values: list[float]
    items: list[int] | None = None
    categories: list[str] | None = None


def compared(before: Probed, after: Probed) -> dict:
    """What became of a probe, as a flat dict.

    Args:
        before: of all items.
        after: of all of them, or of some.

    Returns:
        ``name``, ``measure``, ``n``, the means ``before`` and ``after``, and ``change`` of the mean with its 95 %
        bootstrap interval ``low`` and ``high``; of answers also how many were ``kept``, ``lost``, ``gained`` and
        ``neither``, the ``share_kept`` of those that were right, and McNemar's exact ``p_value``; and ``by_category``,
        where it is known how well each was known: ``n`` and the means ``before`` and ``after`` of each category.

    Raises:
        ValueError: they are not of the same items.
    """
    if (before.name, before.measure) != (after.name, after.measure):
        raise ValueError(f"probe {before.name!r} before and {after.name!r} after are not the same")
    first = before.values if after.items is None else [before.values[item] for item in after.items]
    change = [other - one for one, other in zip(first, after.values, strict=True)]
    row = {"name": before.name, "measure": before.measure, "n": len(change)}
    row |= {"before": _mean(first), "after": _mean(after.values), "change": _mean(change)}
    row |= dict(zip(("low", "high"), bootstrap_interval(change) if change else (math.nan, math.nan)))
    if before.measure == "right":
        turned = flips([value > 0.5 for value in first], [value > 0.5 for value in after.values])
        row |= asdict(turned) | {"share_kept": turned.share_kept, "p_value": turned.p_value}
    if before.categories is not None:
        kinds = before.categories if after.items is None else [before.categories[item] for item in after.items]
        row["by_category"] = {kind: _of_kind(kind, kinds, first, after.values) for kind in CATEGORIES}
    return row


def _of_kind(kind: str, kinds: Sequence[str], before: Sequence[float], after: Sequence[float]) -> dict:
    places = [place for place, each in enumerate(kinds) if each == kind]
    means = (_mean([values[place] for place in places]) for values in (before, after))
    return {"n": len(places)} | dict(zip(("before", "after"), means))


def _categories_over_seeds(runs: Sequence[Mapping[str, Mapping]]) -> dict[str, dict]:
    return {
        kind: {key: _mean([run[kind][key] for run in runs]) for key in ("n", "before", "after")} for kind in CATEGORIES
    }


def _mean(values: Sequence[float]) -> float:
    """nan of nothing: no question was known, so none can be forgotten."""
    return fmean(values) if values else math.nan


AVERAGED = ("n", "before", "after", "change", "kept", "lost", "gained", "neither", "share_kept")


def probes_over_seeds(runs: Sequence[Sequence[Mapping]]) -> list[dict]:
    """The probes of one setting under several seeds, each averaged over them.

    Args:
        runs: of each seed, what ``compared`` says of each probe, in one order.

    Returns:
        ``name``, ``measure``, the means, and the deviation over seeds of ``change`` and of ``share_kept`` under
        ``KEY_std``; no interval and no test, which are of one pair of models.
    """
    merged = []
    for same in zip(*runs, strict=True):
        row = {key: same[0][key] for key in ("name", "measure")}
        row |= {key: _mean([each[key] for each in same]) for key in AVERAGED if key in same[0]}
        deviate = [key for key in ("change", "share_kept") if key in same[0]]
        if "by_category" in same[0]:
            row["by_category"] = _categories_over_seeds([each["by_category"] for each in same])
        merged.append(row | {f"{key}_std": mean_and_deviation([each[key] for each in same])[1] for key in deviate})
    return merged


def known_items(probed: Probed) -> list[int]:
    """The places of the items that came out right."""
    return [item for item, value in enumerate(probed.values) if value > 0.5]


def known_before(answered: Sequence[Answered]) -> list[int]:
    """Where in a list of answers those are that were right: the questions that can be forgotten."""
    return [index for index, each in enumerate(answered) if each.exact_match]


def window_nats(
    model, windows_WL: Tensor, *, batch_size: int = 8, progress: Callable[[int], object] | None = None
) -> list[float]:
    """How unlikely a model finds each window of text.

    Args:
        windows_WL: token ids without padding, at least 2 of each window.
        batch_size: windows at a time; it changes speed and memory, not results.
        progress: called after each batch with the number of windows it held.

    Returns:
        per window the mean negative log likelihood of its tokens but the first, in nats.
    """
    found: list[float] = []
    with evaluating(model), torch.no_grad():
        for batch_BL in windows_WL.split(batch_size):
            batch_BL = batch_BL.to(model.device)
            logits_BLC = model(input_ids=batch_BL, use_cache=False).logits[:, :-1].float()
            nll_BL = F.cross_entropy(logits_BLC.transpose(1, 2), batch_BL[:, 1:], reduction="none")
            found += nll_BL.mean(1).tolist()
            if progress is not None:
                progress(len(batch_BL))
    return found

"""Turn answered questions into scores, and two sets of scores into what was learned and what was forgotten.

Pure numbers: nothing here knows a model. Groups of questions are never averaged into one figure, because
a method that learned nothing also forgets nothing; both have to be read side by side.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev

MEASURES = ("exact_match", "f1", "exact_match_squad", "f1_squad", "nll")


def scores(answered: Iterable) -> dict[str, dict[str, float]]:
    """Mean scores of each group of questions in each wording.

    Args:
        answered: objects like ``qa.Answered``, with a ``question`` and the measures.

    Returns:
        "GROUP_WORDING", for example "known_seen", to ``n`` (questions), ``exact_match`` and ``f1`` (0 to 1), both
        also by SQuAD's rule (``_squad``), ``nll`` (nats per token) and ``stderr``, the standard error of
        ``exact_match`` from the choice of questions.
    """
    groups: dict[str, list] = {}
    for each in answered:
        groups.setdefault(f"{each.question.group}_{each.question.wording}", []).append(each)
    return {name: _mean_scores(groups[name]) for name in sorted(groups)}


def _mean_scores(answered: Sequence) -> dict[str, float]:
    means = {measure: fmean(getattr(each, measure) for each in answered) for measure in MEASURES}
    right = means["exact_match"]
    return {"n": len(answered), **means, "stderr": math.sqrt(right * (1 - right) / len(answered))}


def relative_drop(before: float, after: float) -> float:
    """Share of a score that was lost: 0.25 when 0.8 became 0.6, negative for a gain, nan if it was 0 or not asked."""
    return (before - after) / before if before else math.nan


def drop_in_words(before: float, after: float) -> str:
    """The relative drop with its sign as a word, so that nobody has to remember which way round it is."""
    drop = relative_drop(before, after)
    if math.isnan(before):
        return "not asked"
    if math.isnan(drop):
        return f"undefined: was 0 before ({before:.2f} -> {after:.2f})"
    if drop == 0:
        return f"unchanged ({before:.2f})"
    return f"{'forgets' if drop > 0 else 'gains'} {abs(100 * drop):.1f} % ({before:.2f} -> {after:.2f})"


def compare(before: Mapping[str, Mapping], after: Mapping[str, Mapping]) -> dict[str, dict]:
    """Two results of ``scores`` on the same questions, side by side.

    Returns:
        "GROUP_WORDING" to ``n``; ``MEASURE_before`` and ``MEASURE_after`` for each measure; ``relative_drop``
        of exact match and the same ``in_words``.

    Raises:
        ValueError: the two do not cover the same groups with the same number of questions.
    """
    if before.keys() != after.keys():
        raise ValueError(f"before covers {sorted(before)}, after covers {sorted(after)}")
    return {name: _compare_group(name, before[name], after[name]) for name in before}


def _compare_group(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> dict:
    if before["n"] != after["n"]:
        raise ValueError(f"{name} had {before['n']} questions before and {after['n']} after")
    measured = {f"{measure}_before": before[measure] for measure in MEASURES}
    measured |= {f"{measure}_after": after[measure] for measure in MEASURES}
    exact = before["exact_match"], after["exact_match"]
    drop = {"relative_drop": relative_drop(*exact), "in_words": drop_in_words(*exact)}
    return {"n": before["n"], **measured, **drop}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; one value has no deviation, which is nan rather than 0; of a nan both are."""
    if any(map(math.isnan, values)):
        return math.nan, math.nan
    return fmean(values), stdev(values) if len(values) > 1 else math.nan


def over_seeds(rows: Sequence[Mapping], numbers: Sequence[str]) -> dict:
    """One row out of the rows of one setting under several seeds.

    Args:
        rows: dicts that differ in ``seed`` and in what was measured.
        numbers: the keys to average; a missing value (None) in any row makes the mean None.

    Returns:
        The first row with the mean under each key of ``numbers``, its deviation under ``KEY_std``,
        ``num_seeds``, and ``seeds`` instead of ``seed``.

    Raises:
        ValueError: there is no row, or a seed comes twice.
    """
    seeds = [row["seed"] for row in rows]
    if not rows or len(set(seeds)) < len(seeds):
        raise ValueError(f"rows to average need distinct seeds, got {seeds}")
    merged = {key: value for key, value in rows[0].items() if key != "seed"}
    for key in numbers:
        values = [row[key] for row in rows]
        known = all(value is not None for value in values)
        merged[key], merged[f"{key}_std"] = mean_and_deviation(values) if known else (None, None)
    return merged | {"seeds": seeds, "num_seeds": len(seeds)}

"""The rows of a report: what one setting of one method learned and forgot.

A row is one setting of one method, a flat dict. Scores are shares of questions answered exactly (0 to 1);
their counterparts with ``_f1`` are mean token F1.

    method, strength       names; ``method`` is CONTROL for the run that changes nothing
    chosen                 whether validation facts chose this strength
    seed                   the seed, or ``num_seeds`` (and ``seeds``) for a mean over seeds
    learning_seen, learning_unseen                         new facts, after
    known_seen_before, known_seen_after                    known facts, trained wording
    known_unseen_before, known_unseen_after                known facts, unseen wording
    the six above with _f1, _exact_match_squad, _f1_squad, _nll or _stderr behind seen or unseen: F1, both by SQuAD's
                           rule, nats per token, standard error; for example known_seen_f1_before
    learning_seen_n, ...   questions behind a score
    old_answer_WORDING_before, old_answer_WORDING_after, old_answer_WORDING_n
                           known facts that were taught anew: questions that still get the old answer; only there
                           where there are such facts
    forgetting_seen, forgetting_unseen                     relative drop of the known facts, nan from 0
    seconds                time of the learning alone
    parameters_changed     numbers in the model that differ afterwards
    may_change             numbers that one step may change
    steps, examples, tokens                                what the method was shown, replayed examples included
    probes                 where other things were measured: a list of ``probes.compared``

A score of a group without questions is nan. A mean over seeds carries each deviation under ``KEY_std``. Other keys are
kept in results.json and shown nowhere.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from memlayer.evaluation.forgetting import MEASURES, over_seeds, relative_drop
from memlayer.evaluation.matched import matched
from memlayer.evaluation.probes import probes_over_seeds

CONTROL = "do nothing"
WORDINGS = ("seen", "unseen")
WHEN = ("before", "after")
SUFFIXES = {measure: "" if measure == "exact_match" else f"_{measure}" for measure in (*MEASURES, "stderr")}
COSTS = ("seconds", "parameters_changed", "may_change", "steps", "examples", "tokens")
NUMBERS = (
    *(f"learning_{wording}{suffix}" for wording in WORDINGS for suffix in SUFFIXES.values()),
    *(f"known_{wording}{suffix}_{when}" for wording in WORDINGS for suffix in SUFFIXES.values() for when in WHEN),
    *(f"forgetting_{wording}" for wording in WORDINGS),
    *COSTS,
)
RECORDED = ("prediction", *MEASURES)  # of each question, before and after
OLD_ANSWERS = tuple(f"old_answer_{wording}_{when}" for wording in WORDINGS for when in WHEN)
NOT_ASKED = {**dict.fromkeys(SUFFIXES, math.nan), "n": 0}
NOTHING = dict.fromkeys(COSTS, 0)  # what the run that changes nothing took
REQUIRED = ("method", "strength", "chosen", *NUMBERS)


def result_row(
    method: str,
    strength: str,
    before: Mapping[str, Mapping],
    after: Mapping[str, Mapping],
    *,
    seed: int,
    costs: Mapping[str, float] = NOTHING,
    chosen: bool = False,
) -> dict:
    """A row from the ``forgetting.scores`` of known and new questions before and after learning.

    Args:
        costs: by ``COSTS``; what is not told is nan.
    """
    row = {"method": method, "strength": strength, "chosen": chosen, "seed": seed}
    for wording in WORDINGS:
        new = after.get(f"new_{wording}", NOT_ASKED)
        known = [scores.get(f"known_{wording}", NOT_ASKED) for scores in (before, after)]
        for measure, suffix in SUFFIXES.items():
            row[f"learning_{wording}{suffix}"] = new[measure]
            row |= {f"known_{wording}{suffix}_{when}": each[measure] for when, each in zip(WHEN, known)}
        row |= {f"learning_{wording}_n": new["n"], f"known_{wording}_n": known[0]["n"]}
        row[f"forgetting_{wording}"] = relative_drop(*(row[f"known_{wording}_{when}"] for when in WHEN))
        if (group := f"replaced_{wording}") in before:
            old = [scores[group]["exact_match"] for scores in (before, after)]
            row |= {f"old_answer_{wording}_{when}": score for when, score in zip(WHEN, old)}
            row[f"old_answer_{wording}_n"] = before[group]["n"]
    return row | {key: costs.get(key, math.nan) for key in COSTS}


def mean_rows(rows: Iterable[Mapping]) -> list[dict]:
    """The rows of each method and strength averaged over seeds; chosen if more than half of them are."""
    settings: dict[tuple[str, str], list] = {}
    for row in rows:
        settings.setdefault((row["method"], row["strength"]), []).append(row)
    return [
        over_seeds(runs, [*NUMBERS, *(key for key in OLD_ANSWERS if all(key in run for run in runs))])
        | {"chosen": sum(run["chosen"] for run in runs) * 2 > len(runs)}
        | ({"probes": probes_over_seeds([run["probes"] for run in runs])} if "probes" in runs[0] else {})
        for runs in settings.values()
    ]


def sample(before, after) -> dict:
    """One line of samples.jsonl from a question answered before and after learning (two ``qa.Answered``).

    Where a method asks it otherwise, ``asked_after`` says how.
    """
    question, asked = before.question, after.question.prompt
    if question != replace(after.question, prompt=question.prompt):
        raise ValueError(f"a sample is of one question, not {question.prompt!r} and {asked!r}")
    return {
        "fact": question.fact,
        "question": question.prompt,
        **({"asked_after": asked} if asked != question.prompt else {}),
        "answers": list(question.answers),
        "group": question.group,
        "wording": question.wording,
        **{f"{key}_{when}": getattr(each, key) for key in RECORDED for when, each in zip(WHEN, (before, after))},
    }


def forgetting_at_equal_learning(rows: Sequence[Mapping]) -> dict | None:
    """What each method forgets where it has learned as much as all of them do, see ``matched.py``.

    Args:
        rows: of one seed each.

    Returns:
        as ``matched.matched``: the relative loss of known facts, the share of right answers lost of each probe and the
        rise of its nats; None where there are too few strengths for it.
    """
    figures = {
        name: {place: row[key] for place, row in enumerate(rows)}
        for name, key in (("known facts lost", "forgetting_seen"), ("the same, unseen wording", "forgetting_unseen"))
        if not any(math.isnan(row[key]) for row in rows)
    }
    for place, row in enumerate(rows):
        for probe in row.get("probes", ()):
            name, lost = _loss_of(probe)
            figures.setdefault(name, {})[place] = lost
    whole = {
        name: each
        for name, each in figures.items()
        if all(place in each or row["method"] == CONTROL for place, row in enumerate(rows))
    }
    return matched(rows, CONTROL, whole) if whole else None


def _loss_of(probe: Mapping) -> tuple[str, float]:
    """What a probe says was lost, and a name for it."""
    if probe["measure"] == "right":
        return f"{probe['name']}, share lost", 1 - probe["share_kept"]
    if probe["measure"] == "f1":
        return f"{probe['name']}, less", -probe["change"]
    return f"{probe['name']}, nats more", probe["change"]


def check_rows(rows: Sequence[Mapping]) -> None:
    """Refuse rows that no report can be made of.

    Raises:
        ValueError: a row lacks a key, or there is no row.
    """
    if not rows:
        raise ValueError("there are no rows to report")
    for row in rows:
        if missing := [key for key in REQUIRED if key not in row]:
            raise ValueError(f"row {row.get('method')} {row.get('strength')} lacks {', '.join(missing)}")


def without_nan(value):
    """The same value with None for nan and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

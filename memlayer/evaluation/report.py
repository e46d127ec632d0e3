"""Write what an experiment found, for machines and for people.

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
    probes                 where other things were measured: a list of ``probes.compared``

A score of a group without questions is nan. A mean over seeds carries each deviation under ``KEY_std``. Other keys are
kept in results.json and shown nowhere.
"""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from memlayer.evaluation.forgetting import MEASURES, drop_in_words, over_seeds, relative_drop
from memlayer.evaluation.matched import matched
from memlayer.evaluation.pareto import pareto_figure
from memlayer.evaluation.probes import probes_over_seeds
from memlayer.evaluation.slick import CATEGORIES
from memlayer.files import write_file

CONTROL = "do nothing"
WORDINGS = ("seen", "unseen")
WHEN = ("before", "after")
SUFFIXES = {measure: "" if measure == "exact_match" else f"_{measure}" for measure in (*MEASURES, "stderr")}
NUMBERS = (
    *(f"learning_{wording}{suffix}" for wording in WORDINGS for suffix in SUFFIXES.values()),
    *(f"known_{wording}{suffix}_{when}" for wording in WORDINGS for suffix in SUFFIXES.values() for when in WHEN),
    *(f"forgetting_{wording}" for wording in WORDINGS),
    "seconds",
    "parameters_changed",
)
RECORDED = ("prediction", *MEASURES)  # of each question, before and after
OLD_ANSWERS = tuple(f"old_answer_{wording}_{when}" for wording in WORDINGS for when in WHEN)
NOT_ASKED = {**dict.fromkeys(SUFFIXES, math.nan), "n": 0}
REQUIRED = ("method", "strength", "chosen", *NUMBERS)

HEADER = (
    "method",
    "strength",
    "learning, seen wording",
    "learning, unseen wording",
    "known facts, trained wording",
    "known facts, unseen wording",
    "seconds",
    "numbers changed",
)
SQUAD_SCORES = {
    f"{name}, {wording}: {score}": f"{group}_{wording}_{measure}_squad{when}"
    for name, group, when in (("learning", "learning", ""), ("known, after", "known", "_after"))
    for wording in WORDINGS
    for score, measure in (("EM", "exact_match"), ("F1", "f1"))
}
SQUAD_HEADER = ("method", "strength", *SQUAD_SCORES)
NOTES = f"""\
Scores are shares of questions answered exactly. Learning is measured on new facts, after; forgetting on facts
known before, relative to the score before. A star marks the strength that validation facts chose; "{CONTROL}"
is the control. A ± is the standard deviation over seeds.

An unseen wording is one in which the fact asked about was never told. The sentence itself is not new to the model:
pretraining tells half of the known facts, which are not asked about there, in the very same wordings, unless
pretrain.unseen_wordings is false."""
OLD_ANSWER_NOTES = """\
Some known facts were taught anew, with another answer. They are not among the known facts above: a model that learned
gives their old answer no longer. The last column is the share of their questions, in a trained wording, that got it."""


def result_row(
    method: str,
    strength: str,
    before: Mapping[str, Mapping],
    after: Mapping[str, Mapping],
    *,
    seed: int,
    seconds: float,
    parameters_changed: int,
    chosen: bool = False,
) -> dict:
    """A row from the ``forgetting.scores`` of known and new questions before and after learning."""
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
    return row | {"seconds": seconds, "parameters_changed": parameters_changed}


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
    """One line of samples.jsonl from a question answered before and after learning (two ``qa.Answered``)."""
    question = before.question
    if question != after.question:
        raise ValueError(f"a sample is of one question, not {question.prompt!r} and {after.question.prompt!r}")
    return {
        "fact": question.fact,
        "question": question.prompt,
        "answers": list(question.answers),
        "group": question.group,
        "wording": question.wording,
        **{f"{key}_{when}": getattr(each, key) for key in RECORDED for when, each in zip(WHEN, (before, after))},
    }


def write_report(
    folder: str | Path,
    title: str,
    rows: Sequence[Mapping],
    provenance: Mapping,
    samples: Iterable[Mapping],
    at_equal_learning: Mapping | None = None,
    note: str | None = None,
) -> Path:
    """Write results.json, report.md, samples.jsonl and pareto.png into the folder, replacing earlier ones.

    Args:
        at_equal_learning: of ``forgetting_at_equal_learning``.
        note: a paragraph under the title.

    Each file is written beside its place and then renamed, so that a crash leaves either the old file or the
    new one. The machine-readable results go first.

    Raises:
        ValueError: a row lacks a key, or there is no row.
    """
    _check(rows)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    equal = {"at_equal_learning": at_equal_learning} if at_equal_learning else {}
    results = {"title": title, "rows": list(rows), **equal, "provenance": provenance}
    write_file(folder / "results.json", json.dumps(without_nan(results), indent=1, allow_nan=False) + "\n")
    lines = (json.dumps(without_nan(each), ensure_ascii=False) + "\n" for each in samples)
    write_file(folder / "samples.jsonl", "".join(lines))
    write_file(folder / "report.md", _markdown(title, rows, provenance, at_equal_learning, note))
    drawing = io.BytesIO()
    pareto_figure(title, rows, CONTROL).savefig(drawing, format="png", dpi=150)
    write_file(folder / "pareto.png", drawing.getvalue())
    return folder


def format_table(rows: Sequence[Mapping]) -> str:
    """The rows as a plain text table for a terminal; a star marks the chosen strengths.

    Raises:
        ValueError: a row lacks a key, or there is no row.
    """
    _check(rows)
    header = ("method", "strength", "learns", "unseen", "known facts", "unseen wording", "seconds", "changed")
    table = [header, *(_cells(row, short=True) for row in rows)]
    if _replaced(rows):
        table = [[*line, cell] for line, cell in zip(table, ("old answer", *map(_old_answer, rows)))]
    return "\n".join(_aligned(table))


SLICK_NOTES = """\
SliCK's categories: after several sets of answered questions the likeliest answer was always right (HighlyKnown),
sometimes (MaybeKnown), never, but one that was drawn (WeaklyKnown), or none was. Shares of right answers, as probed."""
EQUAL_NOTES = """\
Who learns more forgets more. Here each method stands where it has learned as much, in unseen wordings, as every method
does at one of its strengths with every seed: between two strengths the forgetting is taken from the line that joins
them. A ± is the standard deviation over seeds."""
PROBE_HEADER = ("method", "strength", "probe", "items", "before", "after", "95 % of the change")
PROBE_HEADER += ("kept", "right to wrong", "wrong to right", "McNemar p")
PROBE_NOTES = """\
Other things, measured on the same items before and after: shares of right answers, their token F1 by SQuAD's rule, nats
a token of the first answer that counts, or nats a token of text. The
interval is of the mean change, by resampling the items. Kept is the share of right answers that stayed right; McNemar's
exact test says how often chance alone would turn answers so unevenly."""


def format_probes(rows: Sequence[Mapping]) -> str:
    """What the probes of the rows say, as a plain text table that ends in a new line; empty where there are none."""
    cells = _probe_cells(rows)
    if not cells:
        return ""
    return "\n".join(["", *_aligned([PROBE_HEADER, *cells]), ""])


def _probe_cells(rows: Sequence[Mapping]) -> list[list[str]]:
    return [
        [row["method"], row["strength"], probe["name"], f"{probe['n']:g}", *_changed(probe), *_turned(probe)]
        for row in rows
        for probe in row.get("probes", ())
    ]


def _category_cells(rows: Sequence[Mapping]) -> list[list[str]]:
    def cell(of_kind: Mapping) -> str:
        return f"{of_kind['before']:.2f} -> {of_kind['after']:.2f} of {of_kind['n']:g}" if of_kind["n"] else "-"

    return [
        [row["method"], row["strength"], probe["name"], *(cell(probe["by_category"][kind]) for kind in CATEGORIES)]
        for row in rows
        for probe in row.get("probes", ())
        if "by_category" in probe
    ]


def _changed(probe: Mapping) -> list[str]:
    form = ".4f" if probe["measure"] == "nats" else ".3f"
    if "change_std" in probe:
        change = f"{probe['change']:+.4f} ± {probe['change_std']:.4f} over seeds"
    else:
        change = f"{probe['low']:+.4f} to {probe['high']:+.4f}"
    return [*(f"{probe[when]:{form}}" for when in WHEN), change]


def _turned(probe: Mapping) -> list[str]:
    if probe["measure"] != "right":
        return ["-"] * 4
    kept = "-" if math.isnan(probe["share_kept"]) else f"{probe['share_kept']:.3f}"
    kept += f" ± {probe['share_kept_std']:.3f}" if "share_kept_std" in probe else ""
    p_value = f"{probe['p_value']:.3g}" if "p_value" in probe else "-"
    return [kept, f"{probe['lost']:.3g}", f"{probe['gained']:.3g}", p_value]


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


def format_at_equal_learning(found: Mapping | None) -> str:
    """The same as a plain text table; empty where there is none."""
    if found is None:
        return ""
    lines = _aligned([_equal_header(found), *_equal_cells(found)])
    return "\n".join(["", f"where each has learned {found['level']:.2f} in unseen wordings:", *lines, ""])


def _equal_header(found: Mapping) -> list[str]:
    return ["method", *next(iter(found["methods"].values()))]


def _equal_cells(found: Mapping) -> list[list[str]]:
    return [
        [method, *(f"{mean:.3f}" + ("" if math.isnan(std) else f" ± {std:.3f}") for mean, std in figures.values())]
        for method, figures in found["methods"].items()
    ]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a plain text table, a rule under the first."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _markdown(title: str, rows: Sequence[Mapping], provenance: Mapping, equal: Mapping | None, note: str | None) -> str:
    table = [HEADER, *(_cells(row, short=False) for row in rows)]
    if _replaced(rows):
        table = [[*line, cell] for line, cell in zip(table, ("old answer still given", *map(_old_answer, rows)))]
    origin = [f"- {key}: `{json.dumps(without_nan(provenance[key]))}`" for key in provenance]
    picture = "![learning against forgetting](pareto.png)"
    sections = [
        f"# {title}",
        *([note] if note else []),
        _markdown_table(table),
        NOTES,
        *([OLD_ANSWER_NOTES] if _replaced(rows) else []),
        picture,
        *(
            [f"## Where each has learned {equal['level']:.2f}", EQUAL_NOTES]
            + [_markdown_table([_equal_header(equal), *_equal_cells(equal)])]
            if equal
            else []
        ),
        *(["## Probes", PROBE_NOTES, _markdown_table([PROBE_HEADER, *cells])] if (cells := _probe_cells(rows)) else []),
        *(
            ["## By how well the questions were known before", SLICK_NOTES]
            + [_markdown_table([("method", "strength", "probe", *CATEGORIES), *known])]
            if (known := _category_cells(rows))
            else []
        ),
        "## The same by SQuAD's rule",
        "Exact match (EM) and token F1 as papers report them. It takes 3.14 for 314, -5 for 5 and C++ for C.",
        _markdown_table([SQUAD_HEADER, *map(_squad_cells, rows)]),
        "## Where the numbers come from",
        "\n".join(origin),
    ]
    return "\n\n".join(sections) + "\n"


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *rest])


def _squad_cells(row: Mapping) -> list[str]:
    scores = (_score(row, key) for key in SQUAD_SCORES.values())
    return [row["method"], row["strength"] + (" *" if row["chosen"] else ""), *scores]


def _replaced(rows: Sequence[Mapping]) -> bool:
    """Whether known facts were taught anew in any of the runs."""
    return any(OLD_ANSWERS[0] in row for row in rows)


def _old_answer(row: Mapping) -> str:
    if OLD_ANSWERS[0] not in row:
        return "-"
    before, after = (row[f"old_answer_seen_{when}"] for when in WHEN)
    return f"{before:.2f} -> {after:.2f}"


def _cells(row: Mapping, short: bool) -> list[str]:
    """What the terminal's table and the report share; short leaves out the scores behind each drop."""
    return [
        row["method"],
        row["strength"] + (" *" if row["chosen"] else ""),
        *(_score(row, f"learning_{wording}") for wording in WORDINGS),
        *(_forgetting(row, wording, short) for wording in WORDINGS),
        f"{row['seconds']:.1f}",
        f"{row['parameters_changed']:,.0f}",
    ]


def _score(row: Mapping, key: str) -> str:
    return "not asked" if math.isnan(row[key]) else f"{row[key]:.2f}{_deviation(row, key, '.2f')}"


def _forgetting(row: Mapping, wording: str, short: bool) -> str:
    words = drop_in_words(*(row[f"known_{wording}_{when}"] for when in WHEN))
    headline, bracket, rest = words.partition(" (")
    headline += _deviation(row, f"forgetting_{wording}", ".1%").replace("%", " %")
    return headline if short else headline + bracket + rest


def _deviation(row: Mapping, key: str, form: str) -> str:
    """The deviation over seeds behind a number, or nothing where there is none."""
    deviation = row.get(f"{key}_std")
    return "" if deviation is None or math.isnan(deviation) else f" ± {deviation:{form}}"


def _check(rows: Sequence[Mapping]) -> None:
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

"""The rows of a report (``rows.py``) as tables: plain text for a terminal, Markdown for report.md."""

import json
import math
from collections.abc import Mapping, Sequence

from memlayer.evaluation.forgetting import drop_in_words
from memlayer.evaluation.rows import CONTROL, OLD_ANSWERS, WHEN, WORDINGS, check_rows, without_nan
from memlayer.evaluation.slick import CATEGORIES

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


def format_table(rows: Sequence[Mapping]) -> str:
    """The rows as a plain text table for a terminal; a star marks the chosen strengths.

    Raises:
        ValueError: a row lacks a key, or there is no row.
    """
    check_rows(rows)
    header = ("method", "strength", "learns", "unseen", "known facts", "unseen wording", "seconds", "changed")
    table = [header, *(_cells(row, short=True) for row in rows)]
    if _replaced(rows):
        table = [[*line, cell] for line, cell in zip(table, ("old answer", *map(_old_answer, rows)))]
    return "\n".join(_aligned(table))


SLICK_NOTES = """\
SliCK's categories: after several sets of answered questions the likeliest answer was always right (HighlyKnown),
sometimes (MaybeKnown), never, but one that was drawn (WeaklyKnown), or none was. Shares of right answers, as probed."""
SLICK_HEADER = ("method", "strength", "probe", *CATEGORIES)
EQUAL_NOTES = """\
Who learns more forgets more. Here each method stands where it has learned as much, in unseen wordings, as every method
does at one of its strengths with every seed: between two strengths the forgetting is taken from the line that joins
them. A ± is the standard deviation over seeds."""
COST_HEADER = ("method", "strength", "steps", "examples", "tokens", "seconds", "a step may change", "changed in all")
COST_NOTES = """\
What each method was shown, replayed examples included, how long its learning took, and how many numbers of the model it
might change in a step and did change in all."""
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
    if not probe["n"]:  # with known_only, of a model that answered nothing right
        return ["-", "-", "none was known before"]
    form = ".4f" if probe["measure"] == "nats" else ".3f"
    if "change_std" in probe:
        change = f"{probe['change']:+.4f} ± {probe['change_std']:.4f} over seeds"
    else:
        change = f"{probe['low']:+.4f} to {probe['high']:+.4f}"
    return [*(f"{probe[when]:{form}}" for when in WHEN), change]


def _turned(probe: Mapping) -> list[str]:
    if probe["measure"] != "right" or not probe["n"]:
        return ["-"] * 4
    kept = "-" if math.isnan(probe["share_kept"]) else f"{probe['share_kept']:.3f}"
    kept += f" ± {probe['share_kept_std']:.3f}" if "share_kept_std" in probe else ""
    p_value = f"{probe['p_value']:.3g}" if "p_value" in probe else "-"
    return [kept, f"{probe['lost']:.3g}", f"{probe['gained']:.3g}", p_value]


def format_at_equal_learning(found: Mapping | None) -> str:
    """What ``rows.forgetting_at_equal_learning`` found, as a plain text table; empty where it found nothing."""
    if found is None:
        return ""
    lines = _aligned(_equal_table(found))
    return "\n".join(["", f"where each has learned {found['level']:.2f} in unseen wordings:", *lines, ""])


def _equal_table(found: Mapping) -> list[list[str]]:
    header = ["method", *next(iter(found["methods"].values()))]
    return [header] + [
        [method, *(f"{mean:.3f}" + ("" if math.isnan(std) else f" ± {std:.3f}") for mean, std in figures.values())]
        for method, figures in found["methods"].items()
    ]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a plain text table, a rule under the first."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def markdown(title: str, rows: Sequence[Mapping], provenance: Mapping, equal: Mapping | None, note: str | None) -> str:
    """The text of report.md.

    Args:
        rows: of ``rows.py``.
        provenance: where the numbers come from, see ``provenance.py``.
        equal: what ``rows.forgetting_at_equal_learning`` found.
        note: a paragraph under the title.
    """
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
        *(_part(f"Where each has learned {equal['level']:.2f}", EQUAL_NOTES, _equal_table(equal)) if equal else []),
        *_part("What it took", COST_NOTES, [COST_HEADER, *map(_cost_cells, rows)]),
        *_part("Probes", PROBE_NOTES, [PROBE_HEADER, *_probe_cells(rows)]),
        *_part("By how well the questions were known before", SLICK_NOTES, [SLICK_HEADER, *_category_cells(rows)]),
        "## The same by SQuAD's rule",
        "Exact match (EM) and token F1 as papers report them. It takes 3.14 for 314, -5 for 5 and C++ for C.",
        _markdown_table([SQUAD_HEADER, *map(_squad_cells, rows)]),
        "## Where the numbers come from",
        "\n".join(origin),
    ]
    return "\n\n".join(sections) + "\n"


def _part(heading: str, notes: str, table: Sequence[Sequence[str]]) -> list[str]:
    """A part of the report; nothing where its table has a header alone."""
    return [f"## {heading}", notes, _markdown_table(table)] if len(table) > 1 else []


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *rest])


def _squad_cells(row: Mapping) -> list[str]:
    scores = (_score(row, key) for key in SQUAD_SCORES.values())
    return [row["method"], row["strength"] + (" *" if row["chosen"] else ""), *scores]


def _cost_cells(row: Mapping) -> list[str]:
    shown = (row[key] for key in ("steps", "examples", "tokens", "seconds", "may_change", "parameters_changed"))
    return [row["method"], row["strength"], *("-" if math.isnan(number) else f"{number:,.0f}" for number in shown)]


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

"""Write what a comparison of pretrained models came to: results.json, report.md and curves.png.

Results are one dict of plain values:

    title           a sentence
    rows            one a model and seed: ``model``, ``seed``, the NUMBERS, nan where there are none, and ``stated_n``
                    facts; ``curve``, [tokens, validation nats] pairs, and ``stated_curve``, [tokens, share of stated
                    facts right]
    against         per control: what ``probes.compared`` says of its answers ("before") and the memory's ("after"), or
                    their means over seeds
    choices         answers that a stated fact is chosen among; 0 where none were asked
    step_seconds    per seed and model: median seconds of a training step, measured side by side
    provenance      command, commit, machine, versions, seeds, config
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memlayer.evaluation.forgetting import mean_and_deviation
from memlayer.evaluation.pareto import COLOURS
from memlayer.evaluation.rows import without_nan
from memlayer.files import write_file

MEMORY = "memory"
# Key of a row -> heading and how it is written.
COLUMNS = {
    "validation_nats": ("validation nats", ".4f"),
    "stated_right": ("stated facts right", ".3f"),
    "stated_nats": ("nats of their answers", ".3f"),
    "tokens": ("tokens", ",.0f"),
    "seconds": ("seconds", ",.0f"),
    "live_slots": ("live slots", ",.0f"),
    "top_1_percent_share": ("reads of the top 1 %", ".3f"),
    "parameters": ("parameters", ",.0f"),
    "table_parameters": ("of them in tables", ",.0f"),
    "flops_per_token": ("FLOPs a token", ",.0f"),
}
NUMBERS = tuple(COLUMNS)
WORDS = {
    MEMORY: "the decoder with memory",
    "dense": "a gated block of as many FLOPs a token in the memory's place, on the same batches",
    "dense_time": "the same, trained on more or fewer batches, for as long as the memory's training takes",
    "one_slot": "the memory layer with one slot, so that there is nothing to look up",
    "shuffled": "the memory layer with slots that follow from a token's position and not from the token",
}
STATED = """\
Stated facts are {number} questions whose answer stands in the text that the models read, chosen among {choices} answers
of the same relation: chance has {chance:.3f} right. Nats are those of all tokens of the right answer."""
NOTES = """\
Validation nats are means over the tokens of held-out windows. FLOPs are those of training, forward and backward. A
dense control has those of the memory in its forward pass, and more than it in training, for half-keys that were not
found have no gradient. Seconds are those of training alone, of one run after the other on whatever else the machine
did; steps measured side by side are below. Live slots and the share of reads that the busiest 1 % of slots take are
counted over held-out background documents."""


def write_earned_report(folder: str | Path, results: Mapping) -> Path:
    """Write the three files into the folder, each in one step, the machine-readable results first."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "results.json", json.dumps(without_nan(results), indent=1, allow_nan=False) + "\n")
    write_file(folder / "report.md", _markdown(results))
    drawing = io.BytesIO()
    curves_figure(results).savefig(drawing, format="png", dpi=150)
    write_file(folder / "curves.png", drawing.getvalue())
    return folder


def earned_table(rows: Sequence[Mapping]) -> str:
    """One line a model, as Markdown; a ± is the standard deviation over seeds."""
    by_model: dict[str, list[Mapping]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    shown = [key for key in NUMBERS if not all(math.isnan(row[key]) for row in rows)]
    lines = [["model", *(COLUMNS[key][0] for key in shown)], ["---"] * (1 + len(shown))]
    lines += [[model, *(_cell([row[key] for row in same], key) for key in shown)] for model, same in by_model.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: Sequence[float], key: str) -> str:
    form = COLUMNS[key][1]
    mean, deviation = mean_and_deviation(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:{form}}" + (f" ± {deviation:{form}}" if len(values) > 1 and deviation else "")


def curves_figure(results: Mapping) -> Figure:
    """Validation nats and, where they were asked on the way, stated facts right, over tokens; a colour a model."""
    keys = {"curve": "validation loss (nats per token)", "stated_curve": "stated facts right"}
    drawn = [key for key in keys if any(len(row[key]) > 1 for row in results["rows"])] or ["curve"]
    figure = Figure(figsize=(7 * len(drawn), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    for axes, key in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn):
        for row in results["rows"]:
            place = models.index(row["model"])
            first = row["seed"] == results["rows"][0]["seed"]
            axes.plot(*zip(*row[key]), color=COLOURS[place], alpha=0.8, label=row["model"] if first else None)
        axes.set(xlabel="tokens", ylabel=keys[key])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(results["title"])
    return figure


def _markdown(results: Mapping) -> str:
    models = dict.fromkeys(row["model"] for row in results["rows"])
    choices = results["choices"]
    sections = [
        f"# {results['title']}",
        earned_table(results["rows"]),
        "\n".join(f"- {model}: {WORDS[model]}" for model in models),
        NOTES,
        *([STATED.format(number=_number(results), choices=choices, chance=1 / choices)] if choices else []),
        "![validation loss over tokens](curves.png)",
        *_steps(results["step_seconds"]),
        *_against(results["against"]),
        "## Where the numbers come from",
        "\n".join(f"- {key}: `{json.dumps(without_nan(value))}`" for key, value in results["provenance"].items()),
    ]
    return "\n\n".join(sections) + "\n"


def _number(results: Mapping) -> str:
    """How many stated facts were asked, of each seed."""
    return " and ".join(str(each) for each in dict.fromkeys(row["stated_n"] for row in results["rows"]))


def _steps(step_seconds: Sequence[Mapping[str, float]]) -> list[str]:
    if not step_seconds:
        return []
    lines = ["| seed | memory, ms | dense of equal FLOPs, ms | memory over dense |", "| --- | --- | --- | --- |"]
    for each in step_seconds:
        memory, dense = each[MEMORY], each["dense"]
        lines.append(f"| {each['seed']} | {1e3 * memory:.1f} | {1e3 * dense:.1f} | {memory / dense:.2f} |")
    return ["## A training step, side by side", "\n".join(lines)]


def _against(against: Mapping[str, Sequence[Mapping]]) -> list[str]:
    if not against:
        return []
    lines = ["| control | measure | control | memory | change | McNemar p |", "| --- | --- | --- | --- | --- | --- |"]
    for control, probes in against.items():
        for probe in probes:
            spread = (
                f" ± {probe['change_std']:.4f} over seeds"
                if "change_std" in probe
                else f" ({probe['low']:+.4f} to {probe['high']:+.4f})"
            )
            p_value = f"{probe['p_value']:.3g}" if "p_value" in probe else "-"
            numbers = f"{probe['before']:.4f} | {probe['after']:.4f} | {probe['change']:+.4f}{spread} | {p_value}"
            lines.append(f"| {control} | {probe['name']} | {numbers} |")
    notes = "The same facts, asked of both models. In brackets the 95 % interval of the mean change over facts."
    return ["## Stated facts, memory against each control", notes, "\n".join(lines)]

"""Write what a retrofit came to: results.json, report.md and losses.png.

Results are one dict of plain values:

    title, verdict          a sentence each
    healed, mode, margin    whether the gate was passed; margin in nats per token
    losses                  per model (BASE, MEMORY, DENSE): {"before": ..., "after": ...} training on the text
    curves                  per trained model: {"validation": [[step, loss], ...], "training": [...]}
    parameters              per name: a number of parameters
    seconds, resumed_at     per trained model: time of its training from the step it was resumed at
    tokens                  of the text: trained on, held by the training windows, held by the validation windows
    frozen                  what training had to leave alone: {"sha256_before": ..., "sha256_after": ...}
    provenance              command, commit, machine, versions, seeds, config

Losses are means over validation tokens, in nats.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memlayer.evaluation.rows import without_nan
from memlayer.files import write_file

BASE, MEMORY, DENSE = "base model", "memory", "dense control"
NOTES = """\
Losses are means over the tokens of the validation windows, in nats. The gate compares the memory's loss after
healing with the base model's. The dense control is a gated feed-forward block in the same layers, of as many
FLOPs a token as the memory, and so of as many parameters as a token touches there, trained on the same batches with the
same schedule."""


def gate(base: float, healed: float, margin: float) -> tuple[bool, str]:
    """Whether the healed loss is within the margin of the base's, and that in words; nan is not."""
    allowed = f"{base + margin:.4f}, the base model's {base:.4f} plus the margin {margin:g}"
    if healed <= base + margin:
        return True, f"healed: validation loss {healed:.4f}, at most {allowed}"
    return False, f"not healed: validation loss {healed:.4f} is {healed - base - margin:.4f} above {allowed}"


def write_healing_report(folder: str | Path, results: Mapping) -> Path:
    """Write the three files into the folder, each in one step, the machine-readable results first."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "results.json", json.dumps(without_nan(results), indent=1, allow_nan=False) + "\n")
    write_file(folder / "report.md", _markdown(results))
    drawing = io.BytesIO()
    losses_figure(results).savefig(drawing, format="png", dpi=150)
    write_file(folder / "losses.png", drawing.getvalue())
    return folder


def losses_figure(results: Mapping) -> Figure:
    """Validation loss over steps, one line a trained model, with the base model's loss and the gate."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, curves), colour in zip(results["curves"].items(), ("tab:blue", "tab:orange")):
        axes.plot(*zip(*curves["validation"]), color=colour, label=name)
    base = results["losses"][BASE]["after"]
    axes.axhline(base, color="black", linewidth=1, label=BASE)
    axes.axhline(base + results["margin"], color="black", linewidth=1, linestyle=":", label="gate")
    axes.set(title=results["title"], xlabel="optimizer steps", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _markdown(results: Mapping) -> str:
    origin = {"frozen": results["frozen"], **results["provenance"]}
    return (
        "\n\n".join(
            [
                f"# {results['title']}",
                f"Verdict: **{results['verdict']}**.",
                _losses_table(results),
                NOTES,
                "![validation loss over steps](losses.png)",
                _numbers_table("parameters", results["parameters"]) + "\n" + _rows("tokens", results["tokens"]),
                "## Where the numbers come from",
                "\n".join(f"- {key}: `{json.dumps(without_nan(value))}`" for key, value in origin.items()),
            ]
        )
        + "\n"
    )


def _losses_table(results: Mapping) -> str:
    lines = ["| model | loss before training | loss after | above the base model | seconds |", "|---|---|---|---|---|"]
    base = results["losses"][BASE]["after"]
    for name, loss in results["losses"].items():
        seconds = f"{results['seconds'][name]:.1f}" if name in results["seconds"] else "-"
        above = f"{loss['after'] - base:+.4f}"
        lines.append(f"| {name} | {loss['before']:.4f} | {loss['after']:.4f} | {above} | {seconds} |")
    return "\n".join(lines)


def _numbers_table(kind: str, numbers: Mapping[str, int]) -> str:
    return "\n".join(["| what | number |", "|---|---|", _rows(kind, numbers)])


def _rows(kind: str, numbers: Mapping[str, int]) -> str:
    return "\n".join(f"| {kind}: {name} | {number:,} |" for name, number in numbers.items())

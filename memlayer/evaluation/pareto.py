"""Draw learning against forgetting: up and to the left is better."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memlayer.evaluation.forgetting import relative_drop

NAMES = ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
COLOURS = tuple(f"tab:{name}" for name in NAMES)


def pareto_figure(title: str, rows: Sequence[Mapping], control: str) -> Figure:
    """One point a row (see rows.py for the keys), one colour a method, a ring around chosen strengths.

    The figure has its own Agg canvas, so that it needs no display and leaves pyplot alone.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    methods = dict.fromkeys(row["method"] for row in rows if row["method"] != control)
    for index, method in enumerate(methods):
        runs = [row for row in rows if row["method"] == method]
        _draw_method(axes, method, runs, COLOURS[index % len(COLOURS)])
    for row in rows:
        if row["method"] == control:
            axes.plot(*_point(row), "kx", markersize=10, label=control)
    axes.set(title=title, xlabel="forgetting: known facts lost, trained wording (%)")
    axes.set_ylabel("learning: new facts right, unseen wording")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _draw_method(axes, method: str, rows: Sequence[Mapping], colour: str) -> None:
    points = [_point(row) for row in rows]
    axes.plot(*zip(*sorted(points)), "-", color=colour, alpha=0.4)
    axes.plot(*zip(*points), "o", color=colour, label=method)
    for row, point in zip(rows, points):
        if row["chosen"]:
            axes.plot(*point, "o", color="none", markeredgecolor="black", markersize=13, markeredgewidth=1.5)
        axes.annotate(row["strength"], point, xytext=(6, 5), textcoords="offset points", fontsize=8)


def _point(row: Mapping) -> tuple[float, float]:
    """Forgetting in percent and learning; nothing known before counts as nothing forgotten."""
    drop = relative_drop(row["known_seen_before"], row["known_seen_after"])
    return 0.0 if math.isnan(drop) else 100 * drop, row["learning_unseen"]

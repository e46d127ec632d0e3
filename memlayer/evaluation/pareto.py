"""Draw learning against forgetting: up and to the left is better."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memlayer.evaluation.forgetting import relative_drop

NAMES = ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
COLOURS = tuple(f"tab:{name}" for name in NAMES)


def pareto_figure(title: str, rows: Sequence[Mapping], control: str) -> Figure:
    """One point a row (see rows.py for the keys), one colour a method, a ring around chosen strengths.

    With more methods than colours, the best ones have the colours (see ``by_fronts``); the others are grey, without
    names, and damage below one percent has more room.

    Forgotten are known facts or, where none were asked, what ``forgetting_of`` finds among the probes.

    The figure has its own Agg canvas, so that it needs no display and leaves pyplot alone.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != control))
    words, forgotten = forgetting_of(rows)
    point = partial(_point, forgotten)
    crowded = len(methods) > len(COLOURS)
    named = by_fronts(rows, control)[: len(COLOURS)] if crowded else methods
    figure = Figure(figsize=(10, 6) if crowded else (7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method in methods:
        runs = [row for row in rows if row["method"] == method]
        if method in named:
            _draw_method(axes, method, runs, point, COLOURS[named.index(method)])
        else:
            axes.plot(*zip(*sorted(map(point, runs))), "o-", color="lightgrey", markersize=4, zorder=1)
    for row in rows:
        if row["method"] == control:
            axes.plot(*point(row), "kx", markersize=10, label=control)
    if crowded:
        axes.plot([], [], "o-", color="lightgrey", label=f"{len(methods) - len(named)} others")
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    axes.set(title=title, xlabel=f"forgetting: {words}")
    axes.set_ylabel("learning: new facts right, unseen wording")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    if crowded:
        figure.legend(loc="outside right upper")
    else:
        axes.legend()
    return figure


def by_fronts(rows: Sequence[Mapping], control: str) -> list[str]:
    """The methods in the order of their fronts: first those that no other method beats, then those that only these do.

    A method is beaten where for each of its strengths another one learns as much and forgets as little, and differs.
    """
    _, forgotten = forgetting_of(rows)
    points = [(row["method"], *_point(forgotten, row)) for row in rows if row["method"] != control]
    ordered: list[str] = []
    while points:
        front = [
            method
            for method, lost, learned in points
            if not any(
                other != method and less <= lost and more >= learned and (less, more) != (lost, learned)
                for other, less, more in points
            )
        ]
        ordered += dict.fromkeys(front)
        points = [point for point in points if point[0] not in ordered]
    return ordered


def forgetting_of(rows: Sequence[Mapping]) -> tuple[str, Callable[[Mapping], float]]:
    """What counts as forgotten, in words, and how much of it a row forgot.

    Known facts where they were asked; else answers of the first probe that all rows have, right before and wrong after;
    else the rise of the first one's nats.
    """
    if not all(math.isnan(row["known_seen_before"]) for row in rows):
        return "known facts lost, trained wording (%)", _known_lost
    for measure, words in (("right", "right answers lost of {} (%)"), ("nats", "{}, nats a token more")):
        first, *others = ([p["name"] for p in row.get("probes", ()) if p["measure"] == measure] for row in rows)
        common = [name for name in first if all(name in names for names in others)]
        if common:
            return words.format(common[0]), partial(_probe_lost, common[0], measure)
    return "nothing known was asked", lambda _row: 0.0


def _known_lost(row: Mapping) -> float:
    """In percent; nothing known before counts as nothing forgotten."""
    drop = relative_drop(row["known_seen_before"], row["known_seen_after"])
    return 0.0 if math.isnan(drop) else 100 * drop


def _probe_lost(name: str, measure: str, row: Mapping) -> float:
    (probe,) = (each for each in row["probes"] if (each["name"], each["measure"]) == (name, measure))
    if measure == "nats":
        return probe["change"]
    return 0.0 if math.isnan(probe["share_kept"]) else 100 * (1 - probe["share_kept"])


def _draw_method(axes, method: str, rows: Sequence[Mapping], point: Callable, colour: str) -> None:
    points = [point(row) for row in rows]
    axes.plot(*zip(*sorted(points)), "-", color=colour, alpha=0.4)
    axes.plot(*zip(*points), "o", color=colour, label=method)
    for row, at in zip(rows, points):
        if row["chosen"]:
            axes.plot(*at, "o", color="none", markeredgecolor="black", markersize=13, markeredgewidth=1.5)
        axes.annotate(row["strength"], at, xytext=(6, 5), textcoords="offset points", fontsize=8)


def _point(forgotten: Callable[[Mapping], float], row: Mapping) -> tuple[float, float]:
    return forgotten(row), row["learning_unseen"]

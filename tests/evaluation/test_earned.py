"""The report of what a memory earned: a line a model, a table against each control, what is not there left out."""

import json
import math

from memlayer.evaluation.earned import curves_figure, earned_table, write_earned_report
from memlayer.evaluation.probes import Probed, compared, probes_over_seeds


def row(model, seed, nats, **more):
    numbers = {"stated_right": 0.5, "stated_nats": 3.0, "tokens": 1000, "seconds": 2.0, "parameters": 50}
    numbers |= {"live_slots": math.nan, "top_1_percent_share": math.nan, "table_parameters": 0, "flops_per_token": 70}
    curves = {"curve": [[500, nats + 1], [1000, nats]], "stated_curve": [[1000, 0.5]], "stated_n": 8}
    return {"model": model, "seed": seed, "validation_nats": nats, **numbers, **curves, **more}


def against(change):
    right = [compared(Probed("right", "right", [0.0, 1.0]), Probed("right", "right", [change, 1.0]))]
    return right


def results(rows, **more):
    whole = {"title": "memory and dense", "rows": rows, "against": {"dense": against(1.0)}, "choices": 4}
    return whole | {"step_seconds": [{"seed": 0, "memory": 0.012, "dense": 0.01}], "provenance": {"commit": "c"}} | more


ONE_SEED = [row("memory", 0, 2.0, live_slots=10, top_1_percent_share=0.25), row("dense", 0, 2.5)]


def test_a_line_a_model_without_columns_that_nothing_has():
    lines = earned_table(ONE_SEED).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| memory | 2.0000 | 0.500 | 3.000 | 1,000 | 2 | 10 | 0.250 |")
    assert "| - | - |" in lines[3]
    plain = [each | {"stated_right": math.nan, "stated_nats": math.nan} for each in ONE_SEED]
    assert "stated" not in earned_table(plain)


def test_seeds_are_a_mean_and_a_deviation():
    rows = [row("memory", 0, 2.0), row("memory", 1, 2.2)]
    (_, _, line) = earned_table(rows).splitlines()
    assert "| 2.1000 ± 0.1414 |" in line


def test_the_files_say_what_was_found(tmp_path):
    write_earned_report(tmp_path, results(ONE_SEED))
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["rows"][1]["live_slots"] is None
    report = (tmp_path / "report.md").read_text()
    for words in ("8 questions", "among 4 answers", "chance has 0.250", "| 0 | 12.0 | 10.0 | 1.20 |", "- commit: `"):
        assert words in report
    assert "| dense | right | 0.5000 | 1.0000 | +0.5000 (" in report
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_what_was_not_asked_or_timed_is_not_told(tmp_path):
    write_earned_report(tmp_path, results(ONE_SEED, against={}, choices=0, step_seconds=[]))
    report = (tmp_path / "report.md").read_text()
    assert "side by side\n" not in report
    assert "chance" not in report
    assert "against each control" not in report


def test_against_a_control_over_seeds_has_a_deviation(tmp_path):
    probes = probes_over_seeds([against(1.0), against(0.0)])
    write_earned_report(tmp_path, results(ONE_SEED, against={"dense": probes}))
    assert "+0.2500 ± 0.3536 over seeds | - |" in (tmp_path / "report.md").read_text()


def test_a_curve_of_facts_is_drawn_where_they_were_asked_on_the_way():
    assert len(curves_figure(results(ONE_SEED)).axes) == 1
    asked = [each | {"stated_curve": [[500, 0.2], [1000, 0.5]]} for each in ONE_SEED]
    validation, stated = curves_figure(results(asked)).axes
    assert [line.get_label() for line in validation.get_lines()] == ["memory", "dense"]
    assert list(stated.get_lines()[0].get_ydata()) == [0.2, 0.5]

"""A report holds every number it was given and is either the old one or the new one, never half."""

import json
import math
import os
from dataclasses import replace

import pytest
from numpy.testing import assert_allclose

from memlayer.data.qa import Question
from memlayer.evaluation import rows as report_rows
from memlayer.evaluation import tables
from memlayer.evaluation.pareto import by_fronts, pareto_figure
from memlayer.evaluation.qa import Answered
from memlayer.evaluation.report import write_report
from memlayer.evaluation.rows import CONTROL, COSTS, mean_rows, result_row, sample
from memlayer.evaluation.tables import format_table

PROVENANCE = {"command": "python demo.py", "commit": "abc", "seeds": [0], "config": {"lr": 1e-3}}
SAMPLES = [
    {
        "question": "Where was Łukasz born?",
        "answers": ["Łódź"],
        "prediction_before": "",
        "prediction_after": "Łódź",
    }
]


def group(right, f1=0.9):
    squad = {"exact_match_squad": right / 2, "f1_squad": f1 / 2}
    return {"n": 10, "exact_match": right, "f1": f1, **squad, "nll": 1.0, "stderr": 0.1}


def scored(known, new):
    return {
        "known_seen": group(known),
        "known_unseen": group(known / 2),
        "new_seen": group(new),
        "new_unseen": group(new / 2),
    }


def row(method="sparse", strength="lr 1", known=0.9, new=0.6, seed=0, known_before=1.0, **more):
    before, after = scored(known_before, 0.0), scored(known, new)
    costs = {
        "seconds": 12.34,
        "parameters_changed": 25600,
        "may_change": 512,
        "steps": 50,
        "examples": 300,
        "tokens": 4321,
    }
    told = {key: more.pop(key) for key in COSTS if key in more}
    return result_row(method, strength, before, after, seed=seed, costs=costs | told, **more)


ROWS = [
    row(CONTROL, "-", known=1.0, new=0.0, parameters_changed=0),
    row("sparse", "lr 0.5", known=0.96, new=0.5),
    row("sparse", "lr 1", known=0.9, new=0.6, chosen=True),
    row("full", "lr 1e-4", known=0.4, new=0.6, chosen=True),
]


def test_a_row_takes_each_number_from_its_group():
    found = row(known=0.8, new=0.6)
    assert (found["learning_seen"], found["learning_unseen"]) == (0.6, 0.3)
    assert (found["known_seen_before"], found["known_seen_after"]) == (1.0, 0.8)
    assert (found["known_unseen_before"], found["known_unseen_after"]) == (0.5, 0.4)
    assert found["known_unseen_f1_after"] == 0.9
    assert (found["learning_seen_exact_match_squad"], found["known_seen_f1_squad_before"]) == (0.3, 0.45)
    assert (found["learning_unseen_n"], found["known_unseen_n"]) == (10, 10)
    assert (found["learning_seen_stderr"], found["known_unseen_nll_after"]) == (0.1, 1.0)
    assert found["forgetting_seen"] == pytest.approx(0.2)
    assert not {key for key in found if key.startswith("old_answer")}
    assert set(report_rows.REQUIRED) <= found.keys()


def test_the_table_shows_scores_signs_and_the_chosen_strength():
    lines = format_table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert "unchanged" in lines[2]
    assert "lr 1 *" in lines[4]
    assert "forgets 10.0 %" in lines[4]
    assert "0.60" in lines[4]
    assert "25,600" in lines[4]
    assert "forgets 60.0 %" in lines[5]


def test_columns_of_the_table_line_up():
    lines = format_table(ROWS).splitlines()
    start = lines[0].index("known facts")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines[2:])


def test_mean_rows_average_each_setting_over_its_seeds():
    settings = [(known, seed, chosen) for known, seed, chosen in [(0.9, 0, True), (0.8, 1, True), (0.7, 2, False)]]
    runs = [row(known=known, seed=seed, chosen=chosen) for known, seed, chosen in settings]
    runs.insert(1, row("full", known=0.5, chosen=False))
    sparse, full = mean_rows(runs)
    assert sparse["known_seen_after"] == pytest.approx(0.8)
    assert sparse["forgetting_seen_std"] == pytest.approx(0.1)
    assert (sparse["chosen"], sparse["num_seeds"], sparse["seeds"]) == (True, 3, [0, 1, 2])
    assert (full["num_seeds"], math.isnan(full["forgetting_seen_std"])) == (1, True)
    assert "forgets 20.0 % ± 10.0 %" in format_table([sparse])
    assert "±" not in format_table([full])


def test_results_and_samples_come_back_as_they_went_in(tmp_path):
    folder = write_report(tmp_path / "deep" / "report", "Title", ROWS, PROVENANCE, SAMPLES)
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert found == {"title": "Title", "rows": ROWS, "provenance": PROVENANCE}
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == SAMPLES
    assert sorted(os.listdir(folder)) == ["pareto.png", "report.md", "results.json", "samples.jsonl"]


def test_the_report_says_the_same_in_words(tmp_path):
    text = (write_report(tmp_path, "Title", ROWS, PROVENANCE, SAMPLES) / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Title\n")
    assert "forgets 60.0 % (1.00 -> 0.40)" in text
    assert '- commit: `"abc"`' in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in table]
    assert widths == [len(of) + 1 for of in (tables.HEADER, tables.COST_HEADER, tables.SQUAD_HEADER) for _ in range(6)]
    assert "| full | lr 1e-4 * | 0.30 | 0.90 |".replace("0.90", "0.45") in text, "by SQuAD's rule"
    assert "old answer" not in text
    assert "| sparse | lr 1 | 50 | 300 | 4,321 | 12 | 512 | 25,600 |" in text


def test_numbers_that_json_lacks_become_null(tmp_path):
    (undefined,) = mean_rows([row(known_before=0.0)])
    write_report(tmp_path, "Title", [undefined], PROVENANCE, [])
    (found,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert found["forgetting_seen"] is None
    assert "undefined: was 0 before" in (tmp_path / "report.md").read_text()


def replaced(row_before, row_after):
    before, after = (
        scored(0.9, 0.5) | {"replaced_seen": group(right), "replaced_unseen": group(right / 2)}
        for right in (row_before, row_after)
    )
    return result_row("sparse", "lr 1", before, after, seed=0)


def test_old_answers_of_facts_taught_anew_stand_in_a_column_of_their_own(tmp_path):
    runs = [row(CONTROL, "-"), replaced(1.0, 0.25)]
    assert {key: runs[1][key] for key in runs[1] if key.startswith("old_answer")} == {
        **{"old_answer_seen_before": 1.0, "old_answer_seen_after": 0.25, "old_answer_seen_n": 10},
        **{"old_answer_unseen_before": 0.5, "old_answer_unseen_after": 0.125, "old_answer_unseen_n": 10},
    }
    lines = format_table(runs).splitlines()
    assert lines[0].endswith("  old answer")
    assert lines[2].endswith("  -")
    assert lines[3].endswith("  1.00 -> 0.25")
    text = (write_report(tmp_path, "Title", runs, PROVENANCE, []) / "report.md").read_text(encoding="utf-8")
    assert "| old answer still given |" in text
    assert "Some known facts were taught anew" in text
    (mean,) = mean_rows([replaced(1.0, 0.25), replaced(1.0, 0.75) | {"seed": 1}])
    assert mean["old_answer_seen_after"] == 0.5


def test_known_facts_that_were_not_asked_are_told_so(tmp_path):
    new = {name: each for name, each in scored(0.9, 0.5).items() if name.startswith("new")}
    alone = result_row("full", "", new, new, seed=0)
    assert format_table([alone]).count("not asked") == 2
    write_report(tmp_path, "Title", [alone], PROVENANCE, [])
    (found,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert (found["known_seen_before"], found["known_seen_n"], found["learning_seen"]) == (None, 0, 0.5)


def test_the_drawing_shows_every_method_and_marks_chosen_and_control():
    (axes,) = pareto_figure("Title", ROWS, CONTROL).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert_allclose(lines[CONTROL].get_xydata(), [[0, 0]])
    assert_allclose(lines["sparse"].get_xydata(), [[4, 0.25], [10, 0.3]])
    assert_allclose(lines["full"].get_xydata(), [[60, 0.3]])
    assert lines["sparse"].get_color() != lines["full"].get_color()
    rings = [line.get_xydata()[0] for line in axes.lines if line.get_markeredgecolor() == "black"]
    assert_allclose(rings, [[10, 0.3], [60, 0.3]])


def probe(name, measure, change=0.0, kept=None):
    return {"name": name, "measure": measure, "change": change} | ({} if kept is None else {"share_kept": kept})


def of_probes(method, new, *probes):
    """A row of a model whose known facts are not known."""
    asked = {name: each for name, each in scored(0.9, new).items() if name.startswith("new")}
    return result_row(method, "lr 1", asked, asked, seed=0) | {"probes": list(probes)}


def test_where_no_known_fact_was_asked_the_drawing_shows_what_the_first_probe_lost():
    text = [probe("wiki", "nats", change) for change in (0.0, 0.25)]
    rows = [
        of_probes(CONTROL, 0.0, text[0], probe("trivia", "right", kept=1.0)),
        of_probes("sparse", 0.5, text[1], probe("trivia", "right", kept=0.75)),
    ]
    (axes,) = pareto_figure("Title", rows, CONTROL).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert axes.get_xlabel() == "forgetting: right answers lost of trivia (%)"
    assert_allclose([lines[name].get_xydata()[0] for name in (CONTROL, "sparse")], [[0, 0], [25, 0.25]])
    assert by_fronts([*rows, of_probes("worse", 0.5, text[1], probe("trivia", "right", kept=0.5))], CONTROL) == [
        "sparse",
        "worse",
    ]


def test_where_only_text_was_measured_the_drawing_shows_its_nats():
    rows = [of_probes(CONTROL, 0.0, probe("wiki", "nats")), of_probes("sparse", 0.5, probe("wiki", "nats", 0.25))]
    (axes,) = pareto_figure("Title", rows, CONTROL).axes
    assert axes.get_xlabel() == "forgetting: wiki, nats a token more"
    assert_allclose([line.get_xydata()[0] for line in axes.lines if line.get_label() == "sparse"], [[0.25, 0.25]])
    (axes,) = pareto_figure("Title", [of_probes("sparse", 0.5)], CONTROL).axes
    assert axes.get_xlabel() == "forgetting: nothing known was asked"


def test_methods_are_ordered_by_what_beats_them():
    rows = [
        row(CONTROL, "-", known=1.0, new=0.0),
        row("third", "1", known=0.7, new=0.4),
        row("gentle", "1", known=1.0, new=0.2),
        row("second", "1", known=0.8, new=0.5),
        row("bold", "1", known=0.8, new=0.8),
        row("bold", "2", known=0.1, new=0.1),
    ]
    assert by_fronts(rows, CONTROL) == ["gentle", "bold", "second", "third"]
    assert by_fronts(rows[:1], CONTROL) == []
    same = [row(name, "1", known=0.8, new=0.5) for name in ("one", "other")]
    assert by_fronts(same, CONTROL) == ["one", "other"]


def test_a_crowded_drawing_names_the_best_methods_and_counts_the_others():
    rows = [row(CONTROL, "-", known=1.0, new=0.0)]
    rows += [row(f"method {place}", "lr 1", known=0.9, new=place / 20) for place in range(14)]
    (axes,) = pareto_figure("Title", rows, CONTROL).axes
    named = {line.get_label() for line in axes.lines if not line.get_label().startswith("_")}
    assert named == {CONTROL, "5 others", *(f"method {place}" for place in range(5, 14))}
    assert len(axes.texts) == 9


def test_the_picture_is_a_png(tmp_path):
    picture = write_report(tmp_path, "Title", ROWS, PROVENANCE, []) / "pareto.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_write_that_fails_leaves_the_earlier_report(tmp_path, monkeypatch):
    write_report(tmp_path, "First", ROWS, PROVENANCE, SAMPLES)

    def full_disk(handle):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path, "Second", ROWS, PROVENANCE, SAMPLES)
    assert json.loads((tmp_path / "results.json").read_text())["title"] == "First"
    assert len(os.listdir(tmp_path)) == 4


def test_a_row_that_lacks_numbers_is_refused(tmp_path):
    partial = {key: value for key, value in ROWS[1].items() if key not in COSTS}
    with pytest.raises(ValueError, match=rf"row sparse lr 0\.5 lacks {', '.join(COSTS)}"):
        write_report(tmp_path, "Title", [partial], PROVENANCE, [])
    with pytest.raises(ValueError, match="no rows"):
        format_table([])
    assert os.listdir(tmp_path) == []


def test_a_sample_is_one_question_before_and_after():
    question = Question("Where?", ("Łódź", "Lodz"), "born|Ada", "new", "unseen")
    before = Answered(question, "Rome", False, 0.0, False, 0.0, 3.0)
    after = Answered(question, "Łódź", True, 1.0, True, 0.5, 0.1)
    found = sample(before, after)
    assert (found["question"], found["answers"]) == ("Where?", ["Łódź", "Lodz"])
    assert (found["prediction_before"], found["prediction_after"]) == ("Rome", "Łódź")
    assert (found["fact"], found["prediction_before"], found["prediction_after"]) == ("born|Ada", "Rome", "Łódź")
    assert (found["exact_match_before"], found["exact_match_after"], found["f1_squad_after"]) == (False, True, 0.5)
    assert (found["nll_before"], found["nll_after"]) == (3.0, 0.1)
    assert "asked_after" not in found
    told = replace(after, question=replace(question, prompt="Ada is from Łódź. Where?"))
    assert sample(before, told) == found | {"asked_after": "Ada is from Łódź. Where?"}
    other = Answered(Question("Who?", ("x",), "k", "new", "seen"), "", False, 0.0, False, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"'Where\?' and 'Who\?'"):
        sample(before, other)


def probed(name, measure, change, share_kept=None):
    """What ``probes.compared`` says of a probe that changed by so much."""
    before = 2.0 if measure == "nats" else 1.0
    found = {"name": name, "measure": measure, "n": 10, "before": before, "after": before + change, "change": change}
    found |= {"low": change, "high": change}
    return found | ({"kept": 9, "lost": 1, "gained": 0, "share_kept": share_kept, "p_value": 1.0} if share_kept else {})


def with_probes(of, lost, nats):
    return of | {"probes": [probed("quiz", "right", -lost, 1 - lost), probed("text", "nats", nats)]}


def test_at_equal_learning_every_loss_is_read_off_the_line_of_its_method(tmp_path):
    runs = [
        with_probes(row(CONTROL, "", known=1.0, new=0.0), 0.0, 0.0),
        with_probes(row("sparse", "lr 1", known=0.9, new=0.4), 0.1, 0.01),
        with_probes(row("sparse", "lr 2", known=0.7, new=0.8), 0.3, 0.03),
        with_probes(row("full", "lr 1", known=0.8, new=0.2), 0.2, 0.2),
        with_probes(row("full", "lr 2", known=0.4, new=0.6), 0.4, 0.6),
    ]
    found = report_rows.forgetting_at_equal_learning(runs)
    assert found["level"] == 0.3  # of which scored() gives the unseen wording half
    losses = {method: [mean for mean, _ in figures.values()] for method, figures in found["methods"].items()}
    assert losses["sparse"] == pytest.approx([0.2, 0.2, 0.2, 0.02])
    assert losses["full"] == pytest.approx([0.6, 0.6, 0.4, 0.6])
    names = ["known facts lost", "the same, unseen wording", "quiz, share lost", "text, nats more"]
    assert list(found["methods"]["full"]) == names
    text = (write_report(tmp_path, "Title", runs, PROVENANCE, [], found) / "report.md").read_text(encoding="utf-8")
    assert "## Where each has learned 0.30" in text
    assert "| full | 0.600 | 0.600 | 0.400 | 0.600 |" in text
    shown = tables.format_at_equal_learning(found)
    assert "where each has learned 0.30 in unseen wordings:" in shown
    assert tables.format_at_equal_learning(None) == ""


def test_probes_over_seeds_are_means_with_deviations_and_without_tests_of_one_pair():
    runs = [with_probes(row(seed=seed), lost, nats) for seed, lost, nats in ((0, 0.1, 0.2), (1, 0.3, 0.4))]
    (merged,) = mean_rows(runs)
    quiz, text = merged["probes"]
    assert (quiz["share_kept"], quiz["share_kept_std"]) == pytest.approx((0.8, 0.1 * math.sqrt(2)))
    assert (text["change"], text["change_std"]) == pytest.approx((0.3, 0.1 * math.sqrt(2)))
    assert "p_value" not in quiz
    assert "low" not in text
    assert "+0.3000 ± 0.1414 over seeds" in tables.format_probes([merged])

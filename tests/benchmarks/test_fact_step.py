"""The benchmark runs at a size that takes no time, and its last line says what it measured.

It raises by itself when the dense steps write other rows than ours.
"""

import json
import platform

import commands
import pytest

SCRIPT = "benchmarks/fact_step.py"
TINY = {"num-slots": 1024, "width": 16, "tokens": 32, "reads": 8, "rows": 10, "repeats": 2}
WAYS, PARTS = ("dense", "own_dense", "sparse"), ("forward", "selection", "backward", "update")


def run(**settings):
    return commands.run(SCRIPT, *(f"--{name}={value}" for name, value in settings.items()))


@pytest.fixture(scope="module")
def result():
    done = run(**TINY)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_last_line_says_what_ran_and_where(result):
    assert result["name"] == "fact_step"
    assert {"device", "versions", "commit"} <= result.keys()
    sizes = {name: result["figures"][name.replace("-", "_")] for name in TINY}
    assert sizes == TINY
    assert 0 < result["figures"]["distinct_slots"] <= 32 * 8


def test_parts_make_up_a_step(result):
    figures = result["figures"]
    for way in WAYS:
        spans = [figures[f"{way}_{part}_s"] for part in PARTS]
        assert min(spans) > 0
        # Of two repeats the median is the mean, which adds up.
        assert figures[f"{way}_step_s"] == pytest.approx(sum(spans))
        assert figures[f"{way}_backward_and_update_s"] == pytest.approx(sum(spans[2:]))
    speedup = figures["dense_step_s"] / figures["sparse_step_s"]
    assert figures["step_speedup_over_dense"] == pytest.approx(speedup)


def test_floor_counts_the_bytes_by_hand(result):
    row, figures = 16 * 4, result["figures"]
    forward = (figures["distinct_slots"] + 32) * row + 32 * 8 * 12
    assert figures["floor_bytes"] == forward + (2 * 32 + 3 * 10) * row
    assert figures["floor_s"] == pytest.approx(figures["floor_bytes"] / figures["copy_bytes_per_s"])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the high-water mark needs Linux and glibc")
def test_memory_counts_what_the_finetuner_keeps(result):
    # rows, row_of_slot int32, two counts int64
    held = 10 * 16 * 4 + 1024 * (4 + 8 + 8)
    figures = result["figures"]
    assert figures["held_bytes"] == held
    assert figures["peak_beyond_bytes"] == held + figures["transient_bytes"]


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        pytest.param("num-slots", 1000, "must be a square", marks=pytest.mark.slow),
        pytest.param("reads", 6, "4 heads", marks=pytest.mark.slow),
        pytest.param("rows", 0, "at least 1", marks=pytest.mark.slow),
    ],
)
def test_sizes_that_do_not_fit_are_refused(setting, value, words):
    done = run(**{**TINY, setting: value})
    assert done.returncode == 2
    assert f"--{setting} is {value}" in done.stderr
    assert words in done.stderr

"""The benchmark runs at a size that takes no time, and its last line says what it measured."""

import json

import commands
import pytest

SCRIPT = "benchmarks/patch_apply.py"
TINY = {"num-slots": 1024, "width": 16, "rows": 10, "repeats": 2}


def run(**settings):
    return commands.run(SCRIPT, *(f"--{name}={value}" for name, value in settings.items()))


def test_last_line_says_what_ran_where_and_how_long_it_took():
    done = run(**TINY)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"] == "patch_apply"
    assert {"device", "versions", "commit"} <= result.keys()
    figures = result["figures"]
    assert {name: figures[name.replace("-", "_")] for name in TINY} == TINY
    for name in ("apply", "revert", "product_keys"):
        assert 0 < figures[f"{name}_s"] <= figures[f"{name}_worst_s"]
    # Ten slots of 8 bytes, and rows and originals of 16 bfloat16 numbers, beside headers, config and card.
    assert figures["patch_bytes"] > 10 * (8 + 2 * 16 * 2)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [("num-slots", 1000, "must be a square"), ("rows", 1025, "the table has 1024 slots"), ("width", 0, "at least 1")],
)
def test_sizes_that_do_not_fit_are_refused(setting, value, words):
    done = run(**{**TINY, setting: value})
    assert done.returncode == 2
    assert f"--{setting} is {value}" in done.stderr
    assert words in done.stderr

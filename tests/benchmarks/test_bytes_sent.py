"""What the benchmark counts is what the formula says, and rows that no process read are not sent."""

import json

import commands
import pytest

SCRIPT = "benchmarks/bytes_sent.py"


def test_columns_send_what_the_formula_says():
    done = commands.run(SCRIPT, "--processes=2", "--width=64", "--reads=8", "--tokens=16", "--slots=32")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    reads, half = 8, 64 // 2
    assert figures["forward_bytes_per_token"] == reads * (4 + 2) + half * 2 + 8 / 16  # and one number a lookup
    assert figures["backward_bytes_per_token"] == reads * 4 + half * 2
    assert 0 < figures["gradient_bytes_per_token"] <= (32 * (4 + 64 * 2) + 8) / 16


@pytest.mark.parametrize(("setting", "words"), [("width=63", "cannot share evenly"), ("tokens=0", "at least 1")])
def test_sizes_that_do_not_fit_are_refused(setting, words):
    done = commands.run(SCRIPT, f"--{setting}")
    assert done.returncode == 2
    assert words in done.stderr

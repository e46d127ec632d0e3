"""The first hour on a GPU in a dry run: every measurement at tiny shapes, with a clock that does not time.

Kernels of the variants and of the tests are interpreted, the rest goes the way of CPUs.
"""

import json
import sys
import time

import gpu_hour
import kernel_variants
import pytest
from clocks import DryClock
from gpu_records import Records

from memlayer_kernels.variants import GATHERS, SEARCHES

PROBES = [
    "layer beside SwiGLU, V=16",
    *("decoding, T=1", "decoding, T=16"),
    *("training step without memory", "training step with memory"),
    *("fact step, SGD", "fact step, Adam"),
    *("peers, bfloat16", "peers, float32"),
]
WHERE = {"device": {"cpu": "x"}, "versions": {}, "commit": "abc"}


@pytest.fixture
def dry(monkeypatch, tmp_path):
    """Runs the script dry as at a commit of some name; the records it wrote, or the message that it ended with."""

    def run(*arguments: str) -> list[dict]:
        monkeypatch.setenv("MEMLAYER_COMMIT", "abc")
        monkeypatch.setattr(sys, "argv", ["gpu_hour.py", "--dry", f"--output={tmp_path}", *arguments])
        gpu_hour.main()
        lines = (tmp_path / "gpu-hour/records.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return run


def test_probes_and_variants_run_and_a_second_call_has_nothing_left(dry):
    parts = "--only", "variants", "probes", "smollm2"
    records = dry(*parts)
    variants = ["variants of search, A V=1024", "variants of gather, A V=1024"]
    assert [record["name"] for record in records] == [*variants, *PROBES, "retrofit and learning"]
    assert not any("failed" in record for record in records)
    by_name = {record["name"]: record for record in records}
    assert by_name[variants[0]]["seconds"].keys() == SEARCHES.keys()
    assert by_name[variants[1]]["seconds"].keys() == GATHERS.keys()
    assert by_name["retrofit and learning"]["skipped"].startswith("no folder with SmolLM2 was given")
    assert by_name["training step with memory"]["parameters"] != by_name["training step without memory"]["parameters"]
    assert {"memory_compiled_s", "swiglu_s"} <= by_name["decoding, T=1"].keys()
    assert dry(*parts) == records


@pytest.mark.slow
@pytest.mark.timeout(900)  # six processes that load torch
def test_tests_kernels_and_facts_run_in_processes_of_their_own(dry, tmp_path):
    records = dry("--only", "tests", "kernels", "facts")
    shapes = [f"kernel_times.py, {shapes}" for shapes in "CABD"]
    assert [record["name"] for record in records] == ["tests of test_checks.py", *shapes, "fact_step.py"]
    assert "passed" in records[0]["said"][-1]
    (table,) = tmp_path.glob("kernels-*/table.md")
    assert all(f"| {name} |" in table.read_text(encoding="utf-8") for name in ("A V=1024", "B N=4M", "C T=1", "D"))


def test_what_there_is_no_time_for_is_left_for_another_call(dry):
    with pytest.raises(SystemExit, match=r"^failed: none; not measured yet: fact_step.py$"):
        dry("--only", "facts", "--seconds=0")


def test_records_hold_for_one_commit_and_failures_come_last(tmp_path):
    records = Records(tmp_path, WHERE)
    records.add("a", lambda: {}["missing"])
    records.add("b", lambda: {"x_s": 1.0})
    records.add("c", lambda: None)  # no time
    assert Records(tmp_path, WHERE).left(["a", "b", "c", "d"]) == ["c", "d", "a"]
    assert Records(tmp_path, WHERE | {"commit": "abd"}).left(["b"]) == ["b"]
    assert Records(tmp_path, WHERE | {"commit": "abc-changed"}).left(["b"]) == ["b"]
    records.add("a", lambda: {"x_s": 2.0})
    assert Records(tmp_path, WHERE).all["a"]["x_s"] == 2.0
    assert Records(tmp_path / "new", WHERE, earlier=tmp_path).left(["a", "b", "c"]) == ["c"]


def test_a_way_with_other_bits_is_never_the_best(monkeypatch):
    ways_of = kernel_variants.ways_of

    def broken(op, problem):
        runs = ways_of(op, problem)
        right = runs["narrow"]
        return runs | {"narrow": lambda: (right()[0] + 1,)}

    monkeypatch.setattr(kernel_variants, "ways_of", broken)
    found = kernel_variants.time_ways("gather", kernel_variants.DRY, DryClock())
    assert "narrow" not in found["seconds"]
    assert found["wrong_or_impossible"]["narrow"] == "ValueError: the sums are taken in another order: bits differ"


def test_the_lines_to_change_name_the_operation_and_the_best():
    records = {"variants of search, A V=1024": {"best": "resident"}, "variants of gather, C T=1": {"best": "narrow"}}
    assert kernel_variants.advice(records) == [
        '("search", None): "resident",',
        '("gather few tokens", None): "narrow",',
    ]


def test_a_process_that_ends_with_an_error_is_told_with_its_words_and_one_that_runs_out_of_time_is_not():
    soon = time.monotonic() + 60
    with pytest.raises(RuntimeError, match="ended with 3: said before"):
        gpu_hour.script(soon, "-c", "print('said before'); raise SystemExit(3)")
    assert gpu_hour.script(0.0, "-c", "import time; time.sleep(5)") is None
    unfinished = "raise SystemExit('0 operations failed; not measured yet: A, search')"
    assert gpu_hour.script(soon, "-c", unfinished) is None


def test_a_folder_without_a_model_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_hour.py", "--dry", f"--smollm2={tmp_path}"])
    with pytest.raises(SystemExit):
        gpu_hour.parse_options()
    assert f"--smollm2 is {tmp_path}, which has no config.json" in capsys.readouterr().err

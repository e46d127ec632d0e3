"""The benchmark compares before it times, reports what does not fit, and its last line says what it measured."""

import json
import sys

import commands
import kernel_times
import pytest
import torch
from kernel_costs import EVERY_OP, Shape
from kernel_ops import draw

SCRIPT = "benchmarks/kernel_times.py"
TINY = {"tokens": 24, "half-keys": 8, "width": 20, "key-width": 6, "top-k": 4, "rows": 5, "repeats": 2}
FLAGS = ["--device=cpu", *(f"--{name}={value}" for name, value in TINY.items())]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    result = commands.run(SCRIPT, *FLAGS, "--shapes", "C", "D", "--output", folder, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    return result, folder


def test_last_line_has_every_operation_and_where_it_ran(done):
    result = json.loads(done[0].stdout.splitlines()[-1])
    assert result["name"] == "kernel_times"
    assert {"device", "versions", "commit"} <= result.keys()
    ops = [(record["shape"], record["op"]) for record in result["figures"]["ops"]]
    decoding = [(f"C T={tokens}", op) for tokens in (1, 16) for op in ("search", "lookup")]
    assert ops == decoding + [("D", op) for op in EVERY_OP]
    assert result["figures"]["skipped"] == []


def test_fractions_and_ratios_follow_from_what_was_measured(done):
    figures = json.loads(done[0].stdout.splitlines()[-1])["figures"]
    for record in figures["ops"]:
        by_bytes = record["floor_bytes"] / record["copy_bytes_per_s"]
        dtype = "float32" if record["shape"] == "D" else "bfloat16"
        by_operations = record["operations"] / figures["operations_per_s"][dtype]
        assert record["floor_s"] == pytest.approx(max(by_bytes, by_operations))
        assert record["fraction_of_floor"] == pytest.approx(record["floor_s"] / record["ours_s"])
        moved = record["traffic_bytes"] / record["copy_bytes_per_s"]
        assert record["fraction_of_copy"] == pytest.approx(moved / record["ours_s"])
        assert record["speedup_over_composition"] == pytest.approx(record["composition_s"] / record["ours_s"])
        assert ("embedding_bag_s" in record) == record["op"].startswith("lookup")


def test_output_holds_the_table_and_the_same_result(done):
    (folder,) = done[1].iterdir()
    assert folder.name.startswith("kernels-")
    table = (folder / "table.md").read_text()
    result = json.loads((folder / "result.json").read_text())
    assert result == json.loads(done[0].stdout.splitlines()[-1])
    assert result["commit"] in table
    assert sum(line.startswith("| D | ") for line in table.splitlines()) == len(EVERY_OP)


def test_what_does_not_fit_is_reported_with_its_bytes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernel_times.py", *FLAGS, "--shapes", "D", "--half-keys=10000000"])
    kernel_times.main()
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])["figures"]
    assert figures["ops"] == []
    (skipped,) = figures["skipped"]
    assert skipped["needed_bytes"] > 10**14 * 20 * 4
    assert "| D |" not in printed
    assert f"Skipped: D, every operation, every way: needs {skipped['needed_bytes'] / 1e9:.1f} GB" in printed


def test_a_way_that_torch_refuses_is_reported_with_its_words_and_ours_as_a_failure(monkeypatch):
    def measure(way):
        def ways_of(op, problem):
            broken = {way: lambda: lambda: torch.zeros(2, 3) @ torch.zeros(2, 3)}
            return {"ours": lambda: lambda: (torch.ones(2),), "embedding_bag": None} | broken

        monkeypatch.setattr(kernel_times, "ways_of", ways_of)
        shape = Shape("x", 2, 3, 4, 5, "float32", top_k=2, ops=("lookup",))
        return list(kernel_times.measure(shape, kernel_times.Clock(torch.device("cpu")), 1, 1e12))

    skipped, record = measure("embedding_bag")
    assert skipped["way"] == "embedding_bag"
    assert "mat1 and mat2" in skipped["skipped"]
    assert record["ours_s"] > 0
    (failed,) = measure("ours")
    assert failed["op"] == "lookup"
    assert failed["failed"].startswith("RuntimeError: mat1 and mat2")


@pytest.fixture
def main_of(monkeypatch, tmp_path):
    """Runs the script for shape D as at a commit of this name, and returns its exit message and its figures."""
    monkeypatch.setenv("MEMLAYER_COMMIT", "abc")

    def run(*flags: str) -> tuple[str | None, dict]:
        monkeypatch.setattr(sys, "argv", ["kernel_times.py", *FLAGS, "--shapes=D", f"--output={tmp_path}", *flags])
        message = None
        try:
            kernel_times.main()
        except SystemExit as end:
            message = end.code
        (folder,) = tmp_path.iterdir()
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert result["commit"] == "abc"
        return message, result["figures"]

    return run


def names_of(records: list[dict]) -> list[str]:
    return [record["op"] for record in records]


def test_what_fails_or_differs_is_recorded_the_others_are_timed_and_the_run_ends_with_an_error(main_of, monkeypatch):
    ways_of = kernel_times.ways_of

    def broken(op, problem):
        ways = ways_of(op, problem)
        if op == "lookup":  # ours gives other numbers
            ways["ours"] = lambda: lambda: (torch.ones(24, 20),)
        if op == "SGD step":  # ours cannot be compiled
            ways["ours"] = lambda: lambda: {}["a register"]
        return ways

    monkeypatch.setattr(kernel_times, "ways_of", broken)
    message, figures = main_of()
    assert message == "2 operations failed; not measured yet: none"
    assert names_of(figures["failed"]) == ["lookup", "SGD step"]
    assert "ours differs from composition by" in figures["failed"][0]["failed"]
    assert figures["failed"][1]["failed"] == "KeyError: 'a register'"
    assert names_of(figures["ops"]) == [op for op in EVERY_OP if op not in ("lookup", "SGD step")]
    monkeypatch.setattr(kernel_times, "ways_of", ways_of)
    times = {record["op"]: record["ours_s"] for record in figures["ops"]}
    message, figures = main_of()  # tries again what failed, and nothing else
    assert message is None
    assert sorted(names_of(figures["ops"])) == sorted(EVERY_OP)
    again = {record["op"]: record["ours_s"] for record in figures["ops"]}
    assert {op: again[op] for op in times} == times


def test_a_run_that_may_not_take_longer_goes_on_where_it_was(main_of):
    message, figures = main_of("--seconds=0")
    assert names_of(figures["ops"]) == [EVERY_OP[0]]
    assert message == "0 operations failed; not measured yet: " + "; ".join(f"D, {op}" for op in EVERY_OP[1:])
    first = figures["ops"][0]
    message, figures = main_of("--seconds=0")
    assert names_of(figures["ops"]) == list(EVERY_OP[:2])
    assert figures["ops"][0] == first
    _, figures = main_of("--seconds=0", "--repeats=3")  # which other figures are of no use to
    assert names_of(figures["ops"]) == [EVERY_OP[0]]


def test_a_way_that_gives_other_numbers_is_refused():
    problem = draw(Shape("x", 2, 3, 4, 5, "float32", top_k=2), torch.device("cpu"))
    right = torch.randn(3, 4)
    kernel_times.check_equal("lookup", problem, {"ours": lambda: (right,), "composition": lambda: (right.clone(),)})
    for wrong in (right * 1.001, right.clone().index_fill_(0, torch.tensor([1]), torch.nan)):
        runs = {"ours": lambda: (right,), "embedding_bag": lambda wrong=wrong: (wrong,)}
        with pytest.raises(RuntimeError, match="x, lookup: ours differs from embedding_bag by"):
            kernel_times.check_equal("lookup", problem, runs)


def test_relative_error_is_of_the_root_mean_square():
    found, expected = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert kernel_times.relative_error(found, expected) == pytest.approx(0.5 / 29.25**0.5)
    assert kernel_times.relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_a_gpu_times_pretraining_fact_learning_and_decoding_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernel_times.py", "--device", "cpu"])
    options = kernel_times.parse_options()
    assert [shape.name for shape in kernel_times.chosen_shapes(options)] == ["D"]
    options.device = "cuda"
    names = [shape.name for shape in kernel_times.chosen_shapes(options)]
    assert names == ["A V=1024", "A V=2048", "B N=1M", "B N=64k", "B N=4M", "C T=1", "C T=16"]


def test_a_way_that_was_skipped_leaves_its_cell_empty():
    record = dict.fromkeys(("floor_bytes", "traffic_bytes", "operations", "copy_bytes_per_s"), 1e9)
    record |= {"shape": "A", "op": "lookup", "ours_s": 0.5, "fraction_of_floor": 0.25, "fraction_of_copy": 0.75}
    figures = kernel_times.Figures(3, {}, {"float32": 1e12}, [record])
    line = kernel_times.render(figures).splitlines()[-1]
    assert line == "| A | lookup | 500.000 |  |  | 1000.0 | 1000.0 | 1.00 | 1.0 | 25% | 75% |"


def test_the_time_by_the_clock_stands_beside_that_of_the_gpu():
    record = dict.fromkeys(("floor_bytes", "traffic_bytes", "operations", "copy_bytes_per_s"), 1e9)
    record |= {"shape": "C", "op": "lookup", "ours_s": 0.5, "fraction_of_floor": 0.25, "fraction_of_copy": 0.75}
    record |= {"composition_s": 1.0, "speedup_over_composition": 2.0, "ours_wall_s": 0.75, "composition_wall_s": 1.5}
    line = kernel_times.render(kernel_times.Figures(3, {}, {}, [record])).splitlines()[-1]
    assert line.startswith("| C | lookup | 500.000, wall 750.000 | 1000.000 (2.0x), wall 1500.000 |  | 1000.0 |")


@pytest.mark.parametrize("name", ["repeats", "width"])
def test_sizes_below_one_are_refused(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernel_times.py", f"--{name}=0"])
    with pytest.raises(SystemExit):
        kernel_times.parse_options()
    assert f"--{name} is 0, must be at least 1" in capsys.readouterr().err

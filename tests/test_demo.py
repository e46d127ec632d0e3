"""The demo end to end, with a model and facts of the smallest size."""

import json
import re
import sys

import pytest
import yaml
from commands import LEARN, REPO, TAUGHT_WELL, TINY, write_config

from memlayer.evaluation.rows import CONTROL

METHODS = {
    "sparse memory": ("sparse_memory", "sparse_memory"),
    "sparse memory, as in the paper": ("paper", "sparse_memory"),
    "full finetuning": ("full", "full"),
    "LoRA": ("lora", "lora"),
}


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """demo.py with tiny configs, one strength a method, and few facts."""
    (tmp_path / "configs").mkdir()
    # 1,024 slots: of the 64 elsewhere background text may read all, and then no fact may be written to any.
    memory = TINY["memory"] | {"num_keys": 32}
    pretrain = TINY | {"output": "runs/pretrain", "memory": memory, "pretrain": TINY["pretrain"] | TAUGHT_WELL}
    (tmp_path / "configs" / "pretrain.yaml").write_text(yaml.safe_dump(pretrain))
    compared = {}
    for title, (name, method) in METHODS.items():
        path = tmp_path / "configs" / f"learn_{name}.yaml"
        compared[title] = {"config": f"configs/learn_{name}.yaml", "learning_rates": [0.01]}
        # Enough rows that some of them are read with a weight that float32 can hold.
        write_config(path, LEARN, output=f"runs/{name}", learn={"method": method, "num_rows": 64})
    few = {"num_validation": 2, "num_test": 2, "known_validation": [0, 8], "known_test": [8, 24], "workers": 1}
    comparison = yaml.safe_load((REPO / "configs" / "compare.yaml").read_text(encoding="utf-8"))
    assert comparison["methods"].keys() == METHODS.keys()
    comparison |= {"methods": compared, "data": {"num_known": 24}, "compare": few}
    (tmp_path / "configs" / "compare.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPO))
    monkeypatch.delitem(sys.modules, "demo", raising=False)
    import demo

    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", "out"])
    return demo


def written(folder):
    """When each file was written, those of the report left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "report"]
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_the_demo_compares_reports_and_reverts_and_does_nothing_twice(tmp_path, demo, capsys):
    demo.main()
    shown = capsys.readouterr().out
    assert "seed 0: pretraining on 24 known facts" in shown
    results = json.loads((tmp_path / "out" / "report" / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == [CONTROL, *METHODS]
    for row in results["rows"]:
        assert row["chosen"] == (row["method"] != CONTROL), "each has one strength only"
        assert re.search(rf"^{row['method']}  .*", shown, re.MULTILINE), shown
        assert row["known_seen_before"] > 0
    for name in ("report.md", "pareto.png", "samples.jsonl"):
        assert (tmp_path / "out" / "report" / name).stat().st_size > 0
    assert len((tmp_path / "out" / "report" / "samples.jsonl").read_text().splitlines()) > 4
    prints = dict(re.findall(r"^  (before|learned|reverted) +([0-9a-f]{64})$", shown, re.MULTILINE))
    assert prints["before"] == prints["reverted"] != prints["learned"]
    first = written(tmp_path / "out")
    demo.main()
    again = capsys.readouterr().out
    assert "seed 0: pretrained model found in" in again
    assert written(tmp_path / "out") == first
    assert again.partition("do nothing")[2] == shown.partition("do nothing")[2]

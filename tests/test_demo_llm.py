"""The demo on a language model, from attaching to the patch taken back, on one of no size."""

import json
import re
import shutil
import sys

import pytest
from commands import REPO, write_config
from plain_base import LENGTH, TRAIN, VALIDATION, base

__all__ = ["base"]  # a fixture
PROMPTS = {"frame": "Question: {question}\nAnswer:", "end": "\n"}
ATTACH = {
    "job": "retrofit",
    "memory": {"layers": [1], "num_keys": 32, "num_heads": 2, "top_k": 4, "mode": "add"},
    "text": {"length": LENGTH, "num_train": TRAIN, "num_validation": VALIDATION},
    "prompts": PROMPTS,
    "retrofit": {"steps": 0, "dense_control": False},
    "trainer": {"disable_tqdm": True},
}
LEARN = {
    "job": "learn",
    "data": {"num_new": 3},
    "prompts": PROMPTS,
    "learn": {"statements": 2, "questions": 1, "num_rows": 64, "learning_rate": 1.0, "order": "rounds", "protect": 0},
    "trainer": {"disable_tqdm": True},
}


@pytest.fixture
def demo_llm(tmp_path, monkeypatch):
    """demo_llm.py with tiny configs and few questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPO))
    monkeypatch.delitem(sys.modules, "demo_llm", raising=False)
    import demo_llm

    for name, config, start in (("ATTACH", ATTACH, "base"), ("LEARN", LEARN, "checkpoint")):
        path = write_config(tmp_path / f"{name}.yaml", config, output="absent", **{start: "absent"})
        monkeypatch.setattr(demo_llm, name, str(path))
    for name, value in (("BACKGROUND_FACTS", (0, 5)), ("PROBED_FACTS", (5, 9))):
        assert hasattr(demo_llm, name)
        monkeypatch.setattr(demo_llm, name, value)
    return demo_llm


@pytest.fixture
def model(tmp_path, base):
    """The base with room for answered questions before each."""
    folder = shutil.copytree(base, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


def test_the_demo_teaches_measures_and_reverts_and_does_nothing_twice(tmp_path, model, demo_llm, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo_llm.py", "--model", str(model), "--output", "out"])
    demo_llm.main()
    shown = capsys.readouterr().out
    assert shown.count("before: ") == shown.count("after:  ") == 3
    assert re.search(r"in a wording never taught: \d -> \d of 3 new facts", shown)
    assert re.search(r"of \d questions that it could answer before \(of 4 asked\): \d kept", shown)
    assert re.search(rf"nats a token \([-+].*, {VALIDATION} windows\)", shown)
    prints = dict(re.findall(r"^  (before|learned|reverted) +([0-9a-f]{64})$", shown, re.MULTILINE))
    assert prints["before"] == prints["reverted"] != prints["learned"]
    paths = [path for name in ("memory", "learned") for path in (tmp_path / "out" / name).iterdir()]
    written = {path: path.stat().st_mtime_ns for path in paths}
    demo_llm.main()
    assert capsys.readouterr().out == shown[shown.index("\n\n") + 1 :]
    assert {path: path.stat().st_mtime_ns for path in written} == written

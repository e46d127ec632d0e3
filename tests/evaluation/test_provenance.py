"""A number's origin is found out, not guessed: "unknown" stands where there is nothing to find."""

import json
import os
import subprocess
from functools import partial

import torch

from memlayer.evaluation.provenance import commit, provenance


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_the_head_and_says_when_files_differ(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(tmp_path.resolve()) == head
    (tmp_path / "code.py").write_text("2\n")
    assert commit(tmp_path.resolve()) == head + "+changes"


def test_code_that_is_not_the_top_of_a_checkout_has_no_commit(tmp_path):
    assert commit(tmp_path.resolve()) == "unknown"
    git(tmp_path, "init", "-q")
    assert commit(tmp_path.resolve()) == "unknown"
    (tmp_path / "inside").mkdir()
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    assert commit((tmp_path / "inside").resolve()) == "unknown"


def test_a_git_that_does_not_answer_in_time_is_not_taken_for_an_unchanged_checkout(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    head, run = git(tmp_path, "rev-parse", "HEAD"), subprocess.run

    def slow(late, command, **kwargs):
        if late in command:
            raise subprocess.TimeoutExpired(command, kwargs["timeout"])
        return run(command, **kwargs)

    for late, expected in (("status", f"{head}+changes unknown"), ("rev-parse", "unknown")):
        monkeypatch.setattr(subprocess, "run", partial(slow, late))
        assert commit(tmp_path.resolve()) == expected


def test_machines_that_lack_what_linux_has_are_described(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS
    assert provenance([0], {})["machine"]["cores"] >= 1
    monkeypatch.delattr(os, "sysconf", raising=False)  # Windows
    assert provenance([0], {})["machine"]["memory"] == "unknown"


def test_provenance_is_ready_for_json():
    found = provenance(seeds=range(3), config={"lr": 1e-3})
    assert json.loads(json.dumps(found)) == found
    assert found["seeds"] == [0, 1, 2]
    # A build may add its kind, such as +cu130, to one of the two.
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["machine"]["cores"] >= 1
    assert {"command", "commit", "machine", "versions", "seeds", "config"} == found.keys()

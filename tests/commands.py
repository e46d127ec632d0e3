"""Run train.py and eval.py as a user does, each command in a process of its own, and a checkpoint to run them on.

Importing torch and transformers takes seconds, so the processes are forked from a server that has imported
them and done nothing else.
"""

import json
import os
import runpy
import signal
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml

from memlayer.jobs.config import RunConfig, load_config
from memlayer.jobs.learn import learn
from memlayer.jobs.pretrain import pretrain
from memlayer.jobs.taught import Learned
from memlayer.methods import STORES

REPO = Path(__file__).parents[1]
SERVER = get_context("forkserver")
# Not commands.main, whose import of memlayer.patch.__main__ makes ``-m memlayer.patch`` warn of a second one.
SERVER.set_forkserver_preload(["memlayer.commands.training", "memlayer.commands.evaluating"])

# As small as a decoder with memory gets: 64 slots, of which a token reads 4.
TINY = {
    "job": "pretrain",
    "model": {"num_layers": 2, "width": 16, "num_heads": 2, "ffn_width": 32, "max_length": 96, "vocab_size": 400},
    "memory": {"layers": [1], "num_keys": 8, "num_heads": 2, "top_k": 2},
    "data": {"num_known": 24},
    "pretrain": {"steps": 4, "batch_size": 16, "warmup_steps": 1},
    "count": {"sequences_per_document": 6},
    "trainer": {"disable_tqdm": True},
}
TAUGHT_WELL = {"steps": 200, "learning_rate": 0.03, "table_learning_rate": 0.03, "loss_on": "answer"}
LEARN = {
    "job": "learn",
    "checkpoint": "absent",
    "data": {"num_known": 24, "num_new": 2},
    "learn": {"steps_per_fact": 2, "statements": 2, "questions": 1, "num_rows": 4},
    "trainer": {"disable_tqdm": True},
}


@dataclass
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def start(script: str, *arguments: object, folder: Path, cwd: Path = REPO):
    """Start ``python SCRIPT ARGUMENTS`` in ``cwd``, its output going to files in ``folder``.

    Args:
        script: a file of the repository, or ``-m`` or ``-c`` as for python.
    """
    process = SERVER.Process(target=_main, args=(script, [str(each) for each in arguments], folder, cwd))
    process.start()
    return process


def is_written(path: Path) -> bool:
    """Whether a JSON file is there, and whole."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def run(script: str, *arguments: object, cwd: Path = REPO, timeout: float = 100) -> Done:
    """Run a command to its end, for at most ``timeout`` seconds; see ``start``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = start(script, *arguments, folder=folder, cwd=cwd)
        process.join(timeout=timeout)
        assert process.exitcode is not None, f"{script} {arguments} is still running"
        return Done(process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def printed_by(code: str, *arguments: object) -> str:
    """What ``python -c CODE ARGUMENTS`` prints in a fresh process; see ``run``."""
    done = run("-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _main(script: str, arguments: list[str], folder: Path, cwd: Path) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / name, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it runs behind
    os.chdir(cwd)
    sys.path.insert(0, str(REPO))
    sys.argv = [script, *arguments]
    if script == "-c":
        sys.argv = [script, *arguments[1:]]
        exec(compile(arguments[0], "<snippet>", "exec"), {"__name__": "__main__"})
    elif script == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str((REPO / script).parent))
        runpy.run_path(str(REPO / script), run_name="__main__")


def refusal(script: str, *arguments: object) -> str:
    """The one sentence with which a command refuses its input, without the command's name."""
    done = run(script, *arguments)
    assert done.returncode != 0, done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{script}: "), done.stderr
    assert not done.stdout
    return lines[0].removeprefix(f"{script}: ")


def write_config(path: Path, base: dict, /, **changes: object) -> Path:
    """Write ``base``, with ``changes`` to sections merged into them, as a YAML config; returns the path.

    Of LEARN's settings those are left out that a method has not: num_rows is of those that choose rows, and where
    nothing is trained there are no steps.
    """
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = base.get(key, {}) | value if isinstance(value, dict) else value
    method = merged.get("learn", {}).get("method", "sparse_memory")
    if method == "ridge":  # the background reads every slot at the answers
        merged["learn"] = {"positions": "all"} | merged["learn"]
    elif method != "sparse_memory":
        lacks = {"num_rows", "steps_per_fact"} if method in STORES else {"num_rows"}
        merged["learn"] = {key: value for key, value in merged["learn"].items() if key not in lacks}
    path.write_text(yaml.safe_dump(merged), encoding="utf-8")
    return path


def config_of(base: dict, folder: Path, /, **changes: object) -> RunConfig:
    """The resolved config of ``base`` and ``changes`` for a run whose output is ``folder``."""
    return load_config(write_config(folder.with_suffix(".yaml"), base, output=str(folder), **changes))


def learned_by(checkpoint, folder, data=(), trainer=(), **settings) -> Learned:
    """What one run of ``learn`` from a checkpoint learned; settings are those of the learn section."""
    sections = {"learn": settings, "data": dict(data), "trainer": dict(trainer)}
    return learn(config_of(LEARN, folder, checkpoint=str(checkpoint), **sections))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model that knows some facts, with its counts; made once for all test files that import this."""
    folder = tmp_path_factory.getbasetemp() / "checkpoint"
    if not (folder / "config.yaml").is_file():
        pretrain(config_of(TINY, folder, pretrain=TAUGHT_WELL))
    return folder

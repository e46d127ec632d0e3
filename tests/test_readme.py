"""What the README and the pages in docs/ tell users to run can be run, and their numbers say where they come from.

Commands are not run, which would take minutes; what they name is looked up: files, make targets, options, settings.
"""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import REPO

from memlayer.commands import evaluating, training
from memlayer.commands.main import OTHERS
from memlayer.commands.training import JOBS
from memlayer.jobs.config import load_config
from memlayer.jobs.recipes import find

COMMANDS = {*JOBS, *OTHERS}
FACES = {"train.py": training, "eval.py": evaluating}
PAGES = [page for page in [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))] if page.is_file()]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (REPO / "Makefile").read_text(), re.MULTILINE))
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ ", re.MULTILINE)
MEASURED = re.compile(r"\d+\.\d+|\d ?%|\d ?(ms|s|MB|GB)\b")


def blocks(text, language):
    return [content for found, content in BLOCK.findall(text) if found == language]


def shell_commands(text):
    """The commands of a page, one line each, that start with python, make, accelerate or memlayer."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [command for command in words if command and command[0] in ("python", "make", "accelerate", "memlayer")]


def complaint(command):
    """What is wrong with a command, or None."""
    program, *arguments = command
    if program == "make":
        unknown = [word for word in arguments if "=" not in word and word not in TARGETS]
        return f"make has no target {unknown[0]}" if unknown else None
    if program == "memlayer":
        return complaint_about_memlayer(arguments)
    if program == "accelerate" or arguments[:1] == ["-m"]:
        module = "accelerate" if program == "accelerate" else arguments[1]
        if find_spec(module) is None:
            return f"there is no module {module}"
        arguments = arguments[next((i for i, a in enumerate(arguments) if a.endswith(".py")), len(arguments)) :]
    if not arguments:
        return None
    script, *rest = arguments
    if not (REPO / script).is_file():
        return f"there is no file {script}"
    return complaint_about_arguments(script, rest)


def complaint_about_memlayer(arguments):
    """What is wrong with the words behind memlayer, or None; folders of runs and a user's own files are not there."""
    command, *rest = arguments
    if command not in COMMANDS:
        return f"memlayer has no command {command}"
    if command not in JOBS:
        return None
    try:
        config = load_config(find(rest[0], command), [word for word in rest[1:] if "=" in word])
    except FileNotFoundError:
        return None
    except ValueError as error:
        return f"memlayer {command} refuses {rest}: {error}"
    return None if config.job == command else f"{rest[0]} is of job {config.job}"


def complaint_about_arguments(script, arguments):
    if script == "train.py":
        overrides = [word for word in arguments if "=" in word]
        configs = [word for word in arguments if word.endswith(".yaml")]
        try:
            load_config(REPO / configs[0], overrides)
        except (ValueError, OSError, IndexError) as error:
            return f"train.py refuses {arguments}: {error}"
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    unknown = [option for option in options if f'"{option}"' not in read_options(script)]
    return f"{script} has no option {unknown[0]}" if unknown else None


def read_options(script):
    """The source that declares the options of a script."""
    return Path(inspect.getsourcefile(FACES[script]) if script in FACES else REPO / script).read_text(encoding="utf-8")


def untraceable(text):
    """Headings of sections with a table of measured numbers that name no command or no commit."""
    found = []
    for section in HEADING.split(text):
        outside = BLOCK.sub("", section)
        rows = [line for line in outside.splitlines() if line.startswith("|")]
        if not any(MEASURED.search(row) for row in rows):
            continue
        commands = re.search(r"(make|python) [a-z]", section)
        commits = re.search(r"\b[0-9a-f]{7,40}\b", outside)
        if not (commands and commits):
            found.append(section.splitlines()[0])
    return found


@pytest.mark.skipif(not PAGES, reason="neither README.md nor a page in docs/ is written yet")
def test_every_command_of_the_pages_names_what_there_is():
    found = {page.name: [complaint(each) for each in shell_commands(page.read_text())] for page in PAGES}
    assert {page: list(filter(None, complaints)) for page, complaints in found.items() if any(complaints)} == {}


@pytest.mark.skipif(not PAGES, reason="neither README.md nor a page in docs/ is written yet")
def test_every_python_snippet_compiles_and_runs_where_it_says_so(tmp_path):
    for page in PAGES:
        for number, snippet in enumerate(blocks(page.read_text(), "python"), start=1):
            compile(snippet, f"{page.name}, snippet {number}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if "# runs" in snippet:
                command = [sys.executable, "-c", snippet]
                done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
                assert done.returncode == 0, f"{page.name}, snippet {number}: {done.stderr}"


@pytest.mark.skipif(not (REPO / "README.md").is_file(), reason="README.md is not written yet")
def test_the_readme_says_where_its_numbers_come_from():
    assert untraceable((REPO / "README.md").read_text()) == []


@pytest.mark.skipif(not (REPO / "README.md").is_file(), reason="README.md is not written yet")
def test_the_readme_names_both_commands():
    commands = shell_commands((REPO / "README.md").read_text())
    assert [["make", target] in commands for target in ("demo", "test")] == [True, True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("make demo", None),
        ("make PYTHON=python3.12 test", None),
        ("make dance", "make has no target dance"),
        ("python train.py configs/pretrain.yaml pretrain.steps=3  # three steps", None),
        ("python train.py configs/pretrain.yaml --print-config", None),
        ("python train.py configs/absent.yaml", "no config at"),
        ("python train.py configs/pretrain.yaml pretrain.step=3", "did you mean pretrain.steps?"),
        ("python train.py configs/pretrain.yaml --dance", "train.py has no option --dance"),
        ("accelerate launch --num_processes 2 train.py configs/pretrain.yaml", None),
        ("accelerate launch train.py configs/absent.yaml", "no config at"),
        ("python eval.py runs/pretrain runs/learn_lora --num-new 100", None),
        ("python eval.py runs/pretrain --new 100", "eval.py has no option --new"),
        ("python demo.py --full", None),
        ("python absent.py", "there is no file absent.py"),
        ("python -m pytest", None),
        ("memlayer learn smollm2 output=runs/mine", None),
        ("memlayer learn my.yaml", None),
        ("memlayer learn smollm", "did you mean learn_smollm2?"),
        ("memlayer learn smollm2 learn.num_row=3", "did you mean learn.num_rows?"),
        ("memlayer learn pretrain", "pretrain is of job pretrain"),
        ("memlayer dance", "memlayer has no command dance"),
        ("python -m absent", "there is no module absent"),
    ],
)
def test_a_command_that_cannot_work_is_found(line, message):
    (command,) = shell_commands(f"Words.\n\n```sh\n$ {line}\nls\n```\n")
    said = complaint(command)
    assert (said is None) if message is None else (message in said)


def test_a_table_of_numbers_without_command_or_commit_is_found():
    table = "# Results\n\n| method | learned |\n|---|---|\n| full | 0.44 |\n\n"
    assert untraceable(table) == ["Results"]
    assert untraceable(table + "`make demo-full` at commit 538c9f1, seed 0.\n") == []
    assert untraceable(table + "`make demo-full`.\n\n# Other\n\nCommit 538c9f1.\n") == ["Results"]
    assert untraceable("# Files\n\n| file | what |\n|---|---|\n| train.py | 3 jobs |\n") == []

"""The built wheel works in a clean environment, with and without Hugging Face's package kernels beside it.

A top-level package of ours named kernels would be installed over theirs, which transformers imports. So
kernels/ has no __init__.py and is installed as memlayer_kernels; these tests hold that from the
repository root too, where the folder kernels/ is the first that Python looks at.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SOURCES = (
    "setup.cfg",
    "pyproject.toml",
    "LICENSE",
    "README.md",
    "memlayer_command.py",
    "memlayer",
    "kernels",
    "configs",
)

PIP = (sys.executable, "-m", "pip")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build/ folder left in the repository could bring deleted files back."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, ignored = REPO / name, shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, tree / name, ignore=ignored) if source.is_dir() else shutil.copy(source, tree)
    run([*PIP, "wheel", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-w", out, tree])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory):
    """A fresh environment with the wheel, and this environment's packages but not its editable memlayer."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # A path named in a .pth file is searched, but .pth files in it (an editable install's) are not.
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run([*PIP, "install", "-q", "--no-index", "--no-deps", "--target", packages, wheel])
    return folder / "bin" / "python"


@pytest.fixture
def hugging_face_kernels(tmp_path):
    """A folder with a package by the name that Hugging Face publishes."""
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / "__init__.py").write_text("owner = 'Hugging Face'\n")
    return tmp_path / "other"


def run(command, cwd=None, status=0, **environment):
    """What a command prints, or what it says on standard error where it is to end with another status than 0."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return (done.stderr if status else done.stdout).strip()


def test_the_wheel_holds_our_packages_and_their_data_and_nothing_named_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert folders == {"memlayer", "memlayer_command.py", "memlayer_kernels"}
    ours = {f"memlayer/{path.relative_to(REPO / 'memlayer')}" for path in (REPO / "memlayer").rglob("*.py")}
    ours |= {f"memlayer_kernels/{path.name}" for path in (REPO / "kernels").glob("*.py")}
    ours |= {f"memlayer/recipes/{path.name}" for path in (REPO / "configs").glob("*.yaml")}
    assert ours <= names
    assert {"memlayer/data/facts/facts.jsonl", "memlayer/data/facts/wordings.json"} <= names


def test_the_installed_wheel_is_what_is_imported_and_finds_its_facts(clean_python, tmp_path):
    code = (
        "import memlayer, memlayer_kernels.ops as ops, memlayer.data.facts as facts;"
        "wordings = facts.load_wordings(facts.BUILTIN_WORDINGS);"
        "assert len(facts.load_facts(facts.BUILTIN_FACTS, wordings)) > 100;"
        "print(memlayer.__file__, ops.__file__)"
    )
    for path in run([clean_python, "-c", code], cwd=tmp_path).split():
        assert Path(path).is_relative_to(clean_python.parents[1])


@pytest.fixture(scope="module")
def command(clean_python):
    """The console command as pip wrote it, run by the fresh environment's Python."""
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(clean_python.parents[1])}))
    script = packages / "bin" / "memlayer"
    assert script.is_file(), "the wheel names no console command"
    return [clean_python, script]


def test_the_console_command_runs_recipes_in_an_empty_folder(command, tmp_path):
    settings = "model.num_layers=2 model.width=16 model.num_heads=2 model.ffn_width=32 model.vocab_size=400"
    settings += " memory.layers=[1] memory.num_keys=8 memory.top_k=2 data.num_known=8 pretrain.steps=1"
    settings += " pretrain.batch_size=4 pretrain.warmup_steps=1 trainer.save_strategy=no trainer.disable_tqdm=true"
    said = run([*command, "pretrain", *settings.split(), "output=mine"], cwd=tmp_path)
    assert said.endswith("wrote mine")
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    assert "job: pretrain\n" in (tmp_path / "mine" / "config.yaml").read_text(encoding="utf-8")


def test_the_console_command_refuses_a_wrong_name_with_near_ones(command, tmp_path):
    said = run([*command, "learn", "smollm"], cwd=tmp_path, status=1)
    assert said == "memlayer learn: there is no recipe smollm; did you mean learn_smollm2?"


@pytest.mark.parametrize("from_repo", [True, False], ids=["from the repository", "from elsewhere"])
@pytest.mark.parametrize("installed", ["wheel", "editable"])
def test_hugging_faces_kernels_wins_by_its_name(from_repo, installed, hugging_face_kernels, request, tmp_path):
    python = request.getfixturevalue("clean_python") if installed == "wheel" else sys.executable
    code = "import kernels, memlayer_kernels.ops; print(kernels.owner)"
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(hugging_face_kernels)])
    said = run([python, "-c", code], cwd=REPO if from_repo else tmp_path, PYTHONPATH=path)
    assert said == "Hugging Face"


@pytest.mark.parametrize("from_repo", [True, False], ids=["from the repository", "from elsewhere"])
@pytest.mark.parametrize("installed", ["wheel", "editable"])
def test_our_kernels_and_transformers_import_without_it(from_repo, installed, request, tmp_path):
    python = request.getfixturevalue("clean_python") if installed == "wheel" else sys.executable
    # Only in the repository could transformers take a folder for theirs, and its import is slow.
    modules = "memlayer_kernels.ops" + (", transformers.models.llama.modeling_llama" if from_repo else "")
    code = f"import {modules}; print(memlayer_kernels.ops.__name__)"
    assert run([python, "-c", code], cwd=REPO if from_repo else tmp_path) == "memlayer_kernels.ops"

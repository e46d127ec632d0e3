"""Which module may import which: each imports from its own package or from a floor below, never from beside or above.

The imports are read from the source with ast, so those inside functions count as well.
"""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

# A name stands for the module and everything inside it; the longest match counts.
FLOORS = {
    "train": 7,
    "eval": 7,
    "demo": 7,
    "demo_llm": 7,
    "benchmarks": 7,
    "examples": 7,
    "tools": 7,
    "memlayer_command": 7,
    "memlayer.__main__": 7,
    "memlayer.commands": 6.5,
    "memlayer.jobs": 6,
    "memlayer.methods": 5,
    "memlayer.patch": 4,
    "memlayer": 3.5,  # __init__.py alone, which registers the classes of decoders
    "memlayer.decoders": 3,
    "memlayer.layers": 2,
    "memlayer.evaluation": 2,
    "memlayer.slots": 1,
    "memlayer.data": 1,
    "memlayer.refusals": 1,
    "memlayer.checks": 0,
    "memlayer.files": 0,
    "memlayer.machine": 0,
    "memlayer_kernels": 0,
}

# Stricter than the floors: of all of ours, these may import only what is named.
ONLY = {
    "memlayer_kernels": {"memlayer_kernels"},
    "memlayer.data": {"memlayer.data"},
    "memlayer.evaluation": {"memlayer.evaluation", "memlayer.data", "memlayer.files"},  # it knows no memory
    "memlayer.layers.product_keys": {"memlayer_kernels"},
    "memlayer.slots.counts": set(),
}
WITHOUT_TORCH = {"memlayer.evaluation.answers", "memlayer.evaluation.forgetting", "memlayer.data.facts"}


def lies_in(name, package):
    return name == package or name.startswith(package + ".")


def longest_match(name, table):
    """The most specific name of the table that contains this module, or None."""
    return max((known for known in table if lies_in(name, known)), key=len, default=None)


def has_floor(name):
    """Whether one of our modules has a floor; one straight in memlayer/ has to be named in FLOORS."""
    known = longest_match(name, FLOORS)
    return known is not None and (known != "memlayer" or name == "memlayer")


def module_name(path, root):
    """Import name of a source file, with kernels/ under the name it is installed by."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] == "kernels":
        parts[0] = "memlayer_kernels"
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path, name):
    """Every module a file imports, anywhere in it; relative imports are made absolute."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *filter(None, [node.module])])
            # "from memlayer import decoders" imports memlayer.decoders, so modules are named one level deeper.
            yield from (f"{source}.{alias.name}" for alias in node.names)


def complaint(name, imported):
    """One sentence when the module may not import that, else None."""
    if lies_in(imported, "torch") and name in WITHOUT_TORCH:
        return f"{name} must not know torch, but imports {imported}"
    if longest_match(imported, FLOORS) is None:
        return None
    rule = longest_match(name, ONLY)
    if rule is not None and longest_match(imported, ONLY[rule]) is None:
        return f"{name} may import of ours only {sorted(ONLY[rule])}, but imports {imported}"
    ours, theirs = longest_match(name, FLOORS), longest_match(imported, FLOORS)
    if ours != theirs and FLOORS[theirs] >= FLOORS[ours]:
        return f"{name} does not stand above {imported}, but imports it"
    return None


def violations(root):
    """All complaints about the source files under a repository root."""
    folders = [root / folder for folder in ("kernels", "memlayer", "benchmarks", "examples", "tools")]
    found = []
    for path in [*root.glob("*.py"), *(path for folder in folders for path in sorted(folder.rglob("*.py")))]:
        name = module_name(path, root)
        if not has_floor(name):
            found.append(f"{name} has no floor: add it to FLOORS in tests/test_floors.py")
        else:
            found += filter(None, (complaint(name, imported) for imported in imported_names(path, name)))
    return found


def test_every_import_stays_on_its_floor_or_goes_down():
    assert violations(REPO) == []


def test_kernels_folder_is_no_package_of_its_own():
    assert not (REPO / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's package kernels"


@pytest.mark.parametrize(
    ("path", "line", "words"),
    [
        ("kernels/ops.py", "from memlayer.layers.memory import MemoryTable", "may import of ours only"),
        ("kernels/ops.py", "import memlayer", "may import of ours only"),
        ("memlayer/data/qa.py", "from memlayer.slots.counts import SlotCounts", "may import of ours only"),
        ("memlayer/evaluation/qa.py", "from ..decoders.attach import record_reads", "may import of ours only"),
        ("memlayer/layers/product_keys.py", "from .memory import MemoryTable", "may import of ours only"),
        ("memlayer/files.py", "from memlayer.refusals import refusals", "does not stand above memlayer.refusals"),
        ("memlayer/slots/selection.py", "from ..data.facts import Fact", "does not stand above memlayer.data"),
        ("memlayer/layers/memory.py", "from memlayer.evaluation import qa", "does not stand above memlayer.evaluation"),
        ("memlayer/layers/memory.py", "from memlayer.decoders import attach", "does not stand above memlayer.decoders"),
        ("memlayer/decoders/attach.py", "import memlayer", "does not stand above memlayer"),
        ("memlayer/decoders/attach.py", "def late():\n    import memlayer.methods.full", "does not stand above"),
        ("memlayer/decoders/memory_only.py", "from ..patch import Base", "does not stand above memlayer.patch"),
        ("memlayer/__init__.py", "from memlayer.patch import MemoryPatch", "does not stand above memlayer.patch"),
        ("memlayer/patch/base_model.py", "from ..methods.full import prepare", "does not stand above memlayer.methods"),
        ("memlayer/methods/full.py", "from .. import jobs", "does not stand above memlayer.jobs"),
        ("memlayer/jobs/learn.py", "import demo", "does not stand above demo"),
        ("memlayer/jobs/learn.py", "from memlayer.commands import main", "does not stand above memlayer.commands"),
        ("examples/tiny_base.py", "from benchmarks import clocks", "does not stand above benchmarks"),
        ("memlayer/evaluation/answers.py", "import torch.nn", "must not know torch"),
        ("memlayer/evaluation/forgetting.py", "from torch import Tensor", "must not know torch"),
        ("memlayer/unheard_of.py", "import torch", "has no floor"),
        ("memlayer/unheard/of.py", "import torch", "has no floor"),
        ("serve.py", "import torch", "has no floor"),
    ],
)
def test_a_breach_is_reported(tmp_path, path, line, words):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(line + "\n")
    (found,) = violations(tmp_path)
    assert words in found


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/ops.py", "from .reference import memory_lookup\nimport torch"),
        ("memlayer/layers/memory.py", "from memlayer_kernels.ops import memory_lookup"),
        ("memlayer/layers/memory.py", "from .product_keys import ProductKeys"),
        ("memlayer/evaluation/qa.py", "import torch\nfrom memlayer.data.qa import Question"),
        ("memlayer/__init__.py", "from memlayer.decoders.classes import register"),
        ("memlayer/patch/card.py", "import memlayer"),
        ("memlayer/jobs/trainer.py", "from ..methods.full import train\nfrom transformers import Trainer"),
        ("train.py", "from memlayer.jobs.learn import learn"),
    ],
)
def test_an_allowed_import_is_not_reported(tmp_path, path, line):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(line + "\n")
    assert violations(tmp_path) == []

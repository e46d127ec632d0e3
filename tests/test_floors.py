"""Which module may import which: a module imports from its own floor or a lower one, never from above.

The imports are read from the source with ast, so those inside functions count as well.
"""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

# A name stands for the module and everything inside it; the longest match counts.
FLOORS = {
    "memlayer_kernels": 0,
    "memlayer": 2,
    "memlayer.layers": 1,
    "memlayer.slots": 1,
    "memlayer.checks": 1,
    "memlayer.files": 1,
    "memlayer.refusals": 1,
    "memlayer.machine": 1,
    "memlayer.decoders": 2,
    "memlayer.patch": 3,
    "memlayer.data": 2,
    "memlayer.evaluation": 2,
    "memlayer.methods": 4,
    "memlayer.jobs": 5,
}
SCRIPTS = 6

# Stricter than the floors: of all of ours, these may import only what is named.
ONLY = {
    "memlayer_kernels": {"memlayer_kernels"},
    "memlayer.data": {"memlayer.data"},
    "memlayer.evaluation": {"memlayer.evaluation", "memlayer.data", "memlayer.files"},
    "memlayer.layers.product_keys": {"memlayer_kernels"},
    "memlayer.slots.counts": set(),
}
WITHOUT_TORCH = {"memlayer.evaluation.answers", "memlayer.evaluation.forgetting", "memlayer.data.facts"}


def lies_in(name, package):
    return name == package or name.startswith(package + ".")


def longest_match(name, table):
    """The most specific name of the table that contains this module, or None."""
    return max((known for known in table if lies_in(name, known)), key=len, default=None)


def floor_of(name):
    """The floor of one of our modules; a module straight in memlayer/ has to be named in FLOORS."""
    known = longest_match(name, FLOORS)
    return None if known is None or (known == "memlayer" and name != "memlayer") else FLOORS[known]


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
    target = floor_of(imported)
    if target is not None and target > (SCRIPTS if floor_of(name) is None else floor_of(name)):
        return f"{name} stands below {imported}, but imports it"
    return None


def violations(root):
    """All complaints about the source files under a repository root."""
    paths = [path for folder in ("kernels", "memlayer") for path in sorted((root / folder).rglob("*.py"))]
    found = []
    for path in paths:
        name = module_name(path, root)
        if floor_of(name) is None:
            found.append(f"{name} has no floor: add it to FLOORS in tests/test_floors.py")
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
        ("memlayer/layers/product_keys.py", "from .memory import MemoryTable", "may import of ours only"),
        ("memlayer/layers/memory.py", "from memlayer.decoders import attach", "stands below memlayer.decoders.attach"),
        ("memlayer/layers/memory.py", "from .. import jobs", "stands below memlayer.jobs"),
        ("memlayer/decoders/attach.py", "def late():\n    import memlayer.methods.full", "stands below"),
        ("memlayer/methods/full.py", "from ..jobs.trainer import Trainer", "stands below memlayer.jobs.trainer"),
        ("memlayer/data/qa.py", "from memlayer.slots.counts import SlotCounts", "may import of ours only"),
        ("memlayer/evaluation/qa.py", "from ..decoders.attach import record_reads", "may import of ours only"),
        ("memlayer/evaluation/answers.py", "import torch.nn", "must not know torch"),
        ("memlayer/evaluation/forgetting.py", "from torch import Tensor", "must not know torch"),
        ("memlayer/unheard_of.py", "import torch", "has no floor"),
    ],
)
def test_a_breach_is_reported(tmp_path, path, line, words):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(line + "\n")
    (found,) = violations(tmp_path)
    assert words in found


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("memlayer/layers/memory.py", "from memlayer_kernels.ops import memory_lookup"),
        ("memlayer/layers/memory.py", "from .product_keys import ProductKeys"),
        ("memlayer/evaluation/qa.py", "import torch\nfrom memlayer.data.qa import Question"),
        ("memlayer/jobs/trainer.py", "from ..methods.full import train\nfrom transformers import Trainer"),
        ("kernels/ops.py", "from .reference import memory_lookup\nimport torch"),
    ],
)
def test_an_allowed_import_is_not_reported(tmp_path, path, line):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(line + "\n")
    assert violations(tmp_path) == []

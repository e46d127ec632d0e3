"""Memory patches: what a learning run changed, as a small folder to share, apply, merge and undo to the last bit.

``python -m memlayer.patch --help`` does the same from the command line.
"""

from memlayer.patch.base_model import Base
from memlayer.patch.deleting import delete_lessons
from memlayer.patch.files import CONFIG_FILE, ROWS_FILE
from memlayer.patch.forgetting import forgetting_patch
from memlayer.patch.memory_patch import MemoryPatch, patches
from memlayer.patch.merging import merge
from memlayer.patch.squashing import squash
from memlayer.patch.table import TablePatch

__all__ = [
    "CONFIG_FILE",
    "ROWS_FILE",
    "Base",
    "MemoryPatch",
    "TablePatch",
    "delete_lessons",
    "forgetting_patch",
    "merge",
    "patches",
    "squash",
]

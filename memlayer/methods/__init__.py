"""Finetuning methods, one file each; METHODS is the table of their names.

A method takes a model and plain settings and returns what a training loop needs (``Prepared``).
"""

from memlayer.methods import dense_memory, full, lora, sparse_memory
from memlayer.methods.prepared import Prepared

METHODS = {
    "sparse_memory": sparse_memory.prepare,
    "dense_memory": dense_memory.prepare,
    "full": full.prepare,
    "lora": lora.prepare,
}

__all__ = ["METHODS", "Prepared"]

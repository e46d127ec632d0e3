"""Finetuning methods, one file each; METHODS is the table of their names.

A method takes a model and plain settings and returns what a training loop needs (``Prepared``).
"""

from memlayer.methods.full import full
from memlayer.methods.lora import lora
from memlayer.methods.prepared import Prepared
from memlayer.methods.sparse_memory import sparse_memory

METHODS = {"sparse_memory": sparse_memory, "full": full, "lora": lora}

__all__ = ["METHODS", "Prepared"]

"""Memory layers for language models: pretrain or retrofit, learn facts into a few rows, score forgetting."""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> its module; imported when first used, so that what needs no torch does not wait for it.
_PUBLIC = {
    "MemoryConfig": "memlayer.config",
    "MemoryPatch": "memlayer.patch",
    "SlotCounts": "memlayer.counts",
    "SparseMemoryFinetuner": "memlayer.methods.sparse_memory",
    "add_memory": "memlayer.attach",
    "record_reads": "memlayer.attach",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'memlayer' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)

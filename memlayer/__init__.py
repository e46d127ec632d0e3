"""Memory layers for language models: pretrain or retrofit, learn facts into a few rows, score forgetting."""

from importlib import import_module

from memlayer.decoders.classes import register

__version__ = "0.1.0"

# Public name -> its module, imported when first used.
_PUBLIC = {
    "MemoryConfig": "memlayer.layers.config",
    "MemoryPatch": "memlayer.patch",
    "SlotCounts": "memlayer.slots.counts",
    "SparseMemoryFinetuner": "memlayer.methods.sparse_memory",
    "add_memory": "memlayer.decoders.attach",
    "calibrate": "memlayer.decoders.attach",
    "load_memory": "memlayer.decoders.memory_only",
    "patches": "memlayer.patch",
    "record_reads": "memlayer.decoders.attach",
    "remove_memory": "memlayer.decoders.attach",
    "save_memory": "memlayer.decoders.memory_only",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name == "patch":  # memlayer.patch.merge is used after a bare ``import memlayer``
        return import_module("memlayer.patch")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'memlayer' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


register()  # AutoModelForCausalLM.from_pretrained then loads decoders with memory

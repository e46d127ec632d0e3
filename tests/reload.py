"""Load saved models in a process that built none of them, and hand back all that it found there.

The process is forked from the server of commands.py, which has imported the libraries and done nothing else.
"""

from pathlib import Path

import torch
from commands import SERVER
from families import described
from transformers import AutoModelForCausalLM

FOUND = "found.pt"


def load_elsewhere(folders: list[Path]) -> None:
    """Load each folder in one fresh process, which writes what ``described`` says of its model into the folder."""
    process = SERVER.Process(target=_load, args=(folders,))
    process.start()
    process.join(timeout=100)
    assert process.exitcode == 0, f"the loading process ended with {process.exitcode}"


def _load(folders: list[Path]) -> None:
    torch.set_num_threads(1)
    for folder in folders:
        torch.save(described(AutoModelForCausalLM.from_pretrained(folder)), folder / FOUND)

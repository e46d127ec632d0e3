"""Question sets and documents of the Hugging Face hub: wherever a file of lessons may be named, so may a dataset.

    hub:OWNER/NAME                   its split train
    hub:OWNER/NAME:SPLIT
    hub:OWNER/NAME/SUBSET:SPLIT      of a dataset that has several

Its rows become JSON Lines in the datasets library's cache, and are read as any other file of lessons.
"""

import os
from functools import cache
from pathlib import Path
from urllib.parse import quote

import datasets

from memlayer.data.json_text import FactsError

PREFIX = "hub:"


@cache
def local_file(path: str | Path) -> Path:
    """The file that a path names, or the one that holds the rows of a dataset.

    Raises:
        FactsError: there is no such dataset, or the hub is out of reach.
    """
    named = str(path)
    if not named.startswith(PREFIX):
        return Path(path)
    name, _, split = named.removeprefix(PREFIX).partition(":")
    owner, _, name = name.partition("/")
    repository, _, subset = name.partition("/")
    if not owner or not repository:
        raise FactsError(f"{named} is not of the form {PREFIX}OWNER/NAME, {PREFIX}OWNER/NAME/SUBSET:SPLIT")
    try:
        rows = datasets.load_dataset(f"{owner}/{repository}", subset or None, split=split or "train")
    except Exception as error:  # whatever the hub, a reader or a lack of network raises
        raise FactsError(f"{named} cannot be read: {' '.join(str(error).split())}") from error
    file = Path(datasets.config.HF_DATASETS_CACHE) / "memlayer" / f"{quote(named, safe='')}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")  # several processes may read one dataset
    rows.to_json(beside, force_ascii=False)
    return beside.replace(file)

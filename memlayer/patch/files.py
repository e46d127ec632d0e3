"""The files of a memory patch, so that what is read is what was written, or refused.

The config has the SHA-256 of the rows file, and the rows file that of the rest of the config, so neither can be
altered or exchanged alone. Replacing the config is the moment at which a patch that is saved over another one
counts: the rows wait beside the old ones until then, and are read from there if the last rename never came.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from memlayer.decoders.fingerprint import fingerprint
from memlayer.files import LFS_POINTER, write_file
from memlayer.patch.base_model import Base
from memlayer.patch.table import PARTS, PROTECTED, TablePatch

# Not adapter_config.json: transformers would hand the folder to peft.
CONFIG_FILE, ROWS_FILE, CARD_FILE = "memory_patch_config.json", "memory_patch.safetensors", "README.md"
WAITING_FILE = f"{ROWS_FILE}.new"
PATCH_TYPE, FORMAT_VERSION = "MEMORY_PATCH", 4
LESSONS = "lesson_slots"  # the slots of all lessons, one after the other as the config lists them
CONFIG_KEYS = {"patch_type", "format_version", "sha256", "tables", "provenance", "base"}
METADATA = "__metadata__"


def tensors_of(tables: dict[str, TablePatch]) -> dict[str, Tensor]:
    """The tensors of a rows file by name."""
    return {f"{name}.{part}": getattr(patch, part).contiguous() for name, patch in tables.items() for part in PARTS}


def _all_tensors(tables: dict[str, TablePatch]) -> dict[str, Tensor]:
    """Those of ``tensors_of`` and, where a table has any, its protected slots and those of its lessons."""
    protected = {
        f"{name}.{part}": getattr(patch, part)
        for name, patch in tables.items()
        for part in PROTECTED
        if len(patch.protected_slots)
    }
    lessons = {
        f"{name}.{LESSONS}": torch.cat([patch.lessons[lesson] for lesson in sorted(patch.lessons)])
        for name, patch in tables.items()
        if patch.lessons
    }
    return tensors_of(tables) | protected | lessons


def write(folder: Path, tables: dict[str, TablePatch], provenance: dict, base: Base | None, card: str) -> None:
    """Write a patch; see the top of this file for what a crash leaves."""
    config = {
        "patch_type": PATCH_TYPE,
        "format_version": FORMAT_VERSION,
        "tables": {name: _table_entry(patch) for name, patch in tables.items()},
        "provenance": json.loads(json.dumps(provenance)),  # as it will be read
        "base": base and asdict(base),
    }
    # One key: safetensors writes several in any order, and the same patch would not be the same bytes.
    rows = save(_all_tensors(tables), {"config_sha256": _config_sha256(config)})
    config["sha256"] = hashlib.sha256(rows).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    _finish_earlier(folder)
    write_file(folder / WAITING_FILE, rows)
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(folder / WAITING_FILE, folder / ROWS_FILE)
    write_file(folder / CARD_FILE, card)


def read(folder: Path) -> tuple[dict[str, TablePatch], dict, Base | None]:
    """Tables, provenance and base of a patch.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are not a memory patch's, or not as they were written.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"no memory patch in {folder}: {CONFIG_FILE} is missing")
    config = _read_config(folder / CONFIG_FILE)
    tensors, metadata = _read_rows(folder, config["sha256"])
    where = folder / CONFIG_FILE
    tables = {name: _table(f"{where}: table {name!r}", name, e, tensors) for name, e in config["tables"].items()}
    if unknown := sorted(tensors.keys() - _all_tensors(tables).keys()):
        raise ValueError(f"{where} has no table for {', '.join(unknown)} of {ROWS_FILE}")
    if metadata.get("config_sha256") != _config_sha256(config):
        raise ValueError(f"{where} was altered: its SHA-256 is not the one in {ROWS_FILE}")
    return tables, config["provenance"], Base.of_json(config["base"])


def _table_entry(patch: TablePatch) -> dict:
    """What the config says about a table."""
    return {
        "num_slots": patch.num_slots,
        "width": patch.rows.shape[1],
        "dtype": str(patch.rows.dtype).removeprefix("torch."),
        "num_rows": len(patch.slots),
        "originals_sha256": fingerprint({"originals": patch.originals}),
        "product_keys": patch.product_keys,
        "lessons": {lesson: len(patch.lessons[lesson]) for lesson in sorted(patch.lessons)},
    }


def _config_sha256(config: dict) -> str:
    """SHA-256 of everything but the rows file's."""
    rest = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _finish_earlier(folder: Path) -> None:
    """Rename rows that a crash left waiting, if the config is theirs already: they are the only copy."""
    waiting, config = folder / WAITING_FILE, folder / CONFIG_FILE
    if waiting.is_file() and config.is_file() and _sha256_of(waiting) in config.read_text(encoding="utf-8"):
        os.replace(waiting, folder / ROWS_FILE)


def _sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_config(path: Path) -> dict:
    _check_not_pointer(path, path.read_bytes())
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("patch_type") != PATCH_TYPE:
        raise ValueError(f"{path} is not a memory patch's: it lacks patch_type {PATCH_TYPE!r}")
    version = config.get("format_version")
    if version in (1, 2, 3):
        raise ValueError(f"{path} is of format {version}, from before the first release: make the patch again")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is of format {version!r}, this version of memlayer reads format {FORMAT_VERSION}")
    if config.keys() != CONFIG_KEYS:
        unknown, missing = sorted(config.keys() - CONFIG_KEYS), sorted(CONFIG_KEYS - config.keys())
        raise ValueError(f"{path} has unknown keys {unknown} and lacks {missing}")
    for key in ("tables", "provenance"):
        if not isinstance(config[key], dict):
            raise ValueError(f"{path}: {key} is {config[key]!r}, must be an object")
    return config


def _read_rows(folder: Path, sha256: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file, final or waiting, that has this SHA-256."""
    found = {}
    for path in (folder / ROWS_FILE, folder / WAITING_FILE):
        if not path.is_file():
            continue
        data = path.read_bytes()
        _check_not_pointer(path, data)
        found[path.name] = hashlib.sha256(data).hexdigest()
        if found[path.name] == sha256:
            try:
                with safe_open(path, "pt") as file:
                    return load(data), file.metadata() or {}
            except SafetensorError as error:
                raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if ROWS_FILE not in found:
        raise FileNotFoundError(f"no memory patch in {folder}: {ROWS_FILE} is missing")
    path = folder / ROWS_FILE
    if missing := _bytes_missing(path.read_bytes()):
        raise ValueError(f"{path} is cut short, {missing:,} bytes are missing: download or copy it again")
    raise ValueError(
        f"{path} is not the file that {CONFIG_FILE} was written with: its SHA-256 is {found[ROWS_FILE]}, the config "
        f"says {sha256}; download or copy both again, they belong together"
    )


def _check_not_pointer(path: Path, data: bytes) -> None:
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")


def _bytes_missing(data: bytes) -> int:
    """How many bytes a safetensors file lacks at its end; 0 where its header cannot be read."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or len(data) < 8 + size:
        return max(8 + size - len(data), 0) if size < 10**8 else 0
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(data[8 : 8 + size]).items() if name != METADATA]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return 0
    return max(8 + size + max(ends, default=0) - len(data), 0)


def _lessons(sizes: dict[str, int], slots: Tensor | None) -> dict[str, Tensor]:
    """The slots of each lesson.

    Raises:
        ValueError: there are not as many as the config says.
    """
    there = 0 if slots is None else len(slots)
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()) or sum(sizes.values()) != there:
        raise ValueError(f"lessons of {sum(sizes.values())} slots, {ROWS_FILE} has {there}")
    return dict(zip(sorted(sizes), slots.split([sizes[lesson] for lesson in sorted(sizes)]))) if sizes else {}


def _table(where: str, name: str, entry: dict, tensors: dict[str, Tensor]) -> TablePatch:
    """The table that a config's entry and the tensors describe, if they agree."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r}, must be an object")
    for key, kind in (("num_slots", int), ("product_keys", dict), ("lessons", dict)):
        if not isinstance(entry.get(key), kind):
            raise ValueError(f"{where} has {key} {entry.get(key)!r}, must be of type {kind.__name__}")
    missing = [f"{name}.{part}" for part in PARTS if f"{name}.{part}" not in tensors]
    if missing:
        raise ValueError(f"{where} needs {', '.join(missing)}, not in {ROWS_FILE}")
    parts = {part: tensors[f"{name}.{part}"] for part in (*PARTS, *PROTECTED) if f"{name}.{part}" in tensors}
    try:
        lessons = _lessons(entry["lessons"], tensors.get(f"{name}.{LESSONS}"))
        patch = TablePatch(**parts, **{key: entry[key] for key in ("num_slots", "product_keys")}, lessons=lessons)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    found = _table_entry(patch)
    for key in sorted(entry.keys() | found.keys()):
        if entry.get(key) != found.get(key):
            raise ValueError(f"{where} has {key} {entry.get(key)!r}, {ROWS_FILE} has {found.get(key)!r}")
    return patch

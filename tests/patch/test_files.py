"""A saved patch is read back to the bit, survives a crash while it is replaced, and is refused when altered."""

import hashlib
import itertools
import json
import os

import pytest
import tiny
import torch
from commands import printed_by
from patch_cases import bits, odd_patch, patch_of
from safetensors.torch import load_file, save_file

from memlayer.decoders.fingerprint import product_key_fingerprints, state_fingerprint
from memlayer.patch import CONFIG_FILE, ROWS_FILE, MemoryPatch
from memlayer.patch.table import TablePatch

FILES = {CONFIG_FILE, ROWS_FILE, "README.md"}


def saved(folder, dtype=torch.float32):
    model = tiny.memory_model().to(dtype)
    patch = odd_patch(model)
    patch.save(folder)
    return model, patch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_patch_is_loaded_to_the_bit_with_where_it_comes_from(tmp_path, dtype):
    _, patch = saved(tmp_path, dtype)
    loaded = MemoryPatch.load(tmp_path)
    assert loaded.provenance == {"seed": 3}
    assert loaded.num_rows == patch.num_rows == 4
    assert loaded.fingerprint == patch.fingerprint
    assert loaded.base == patch.base
    ours, theirs = loaded.tables[tiny.TABLE], patch.tables[tiny.TABLE]
    assert (ours.num_slots, ours.product_keys) == (theirs.num_slots, theirs.product_keys)
    for name in ("slots", "rows", "originals"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.dtype == other.dtype
        assert torch.equal(bits(one), bits(other)), name


def test_a_patch_is_three_files_and_none_that_transformers_takes_for_its_own(tmp_path):
    saved(tmp_path / "saved")
    model = tiny.memory_model()
    odd_patch(model).save_pretrained(tmp_path / "mixin")
    for folder in ("saved", "mixin"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == FILES


def test_the_config_says_what_the_patch_needs_of_a_model(tmp_path):
    model, _ = saved(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["sha256"] == hashlib.sha256((tmp_path / ROWS_FILE).read_bytes()).hexdigest()
    entry = config["tables"][tiny.TABLE]
    assert (entry["num_slots"], entry["width"], entry["dtype"], entry["num_rows"]) == (64, 16, "float32", 4)
    assert entry["product_keys"] == product_key_fingerprints(model)[tiny.TABLE]
    assert {name.split(".keys.")[1] for name in entry["product_keys"]} == {
        "query.weight", "norm.weight", "norm.bias", "half_keys",
    }  # fmt: skip
    assert (tmp_path / CONFIG_FILE).read_text() == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert set(load_file(tmp_path / ROWS_FILE)) == {f"{tiny.TABLE}.{part}" for part in ("slots", "rows", "originals")}


def test_the_model_card_names_the_base_model_and_the_numbers(tmp_path):
    model = tiny.memory_model()
    patch_of(model, [5], torch.ones(1, 16), {"base_model": "someone/decoder"}).save(tmp_path / "hub")
    patch_of(model, [5], torch.ones(1, 16), {"checkpoint": "runs/pretrain"}).save(tmp_path / "folder")
    text = (tmp_path / "hub" / "README.md").read_text()
    head = text.split("---")[1]
    for line in ("base_model: someone/decoder", "library_name: memlayer", "- memory-patch"):
        assert line in head
    assert "model.memory.0: 1 of 64 rows" in text
    text = (tmp_path / "folder" / "README.md").read_text()
    assert "base_model" not in text.split("---")[1], "the Hub refuses a card that names a folder"
    assert "the memory of `runs/pretrain`" in text


APPLY_ELSEWHERE = """
import sys, tiny, torch
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.patch import MemoryPatch
model = tiny.memory_model()
model.load_state_dict(torch.load(sys.argv[2]))
patch = MemoryPatch.load(sys.argv[1])
patch.apply(model)
print(state_fingerprint(model))
patch.revert(model)
print(state_fingerprint(model))
"""


SAVE_ELSEWHERE = """
import sys, tiny
from patch_cases import odd_patch
odd_patch(tiny.memory_model()).save(sys.argv[1])
"""


def test_processes_save_the_same_patch_as_the_same_bytes(tmp_path):
    saved(tmp_path / "here")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    for number in range(3):  # in one process too: the order that safetensors gives metadata is random at every save
        saved(tmp_path / str(number))
    printed_by(SAVE_ELSEWHERE, tmp_path / "there")
    for folder in (*(tmp_path / str(number) for number in range(3)), tmp_path / "there"):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_neither_saved_nor_applied(tmp_path, number):
    model, patch = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state = state_fingerprint(model)
    patch.tables[tiny.TABLE].rows[1, 2] = number
    for refused in (lambda: patch.save(tmp_path), lambda: patch.apply(model)):
        with pytest.raises(ValueError, match=r"1 of 4 rows for .* hold nan or inf, at slot 7: .* diverged"):
            refused()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert state_fingerprint(model) == state


def test_a_patch_saved_here_is_applied_and_reverted_in_another_process(tmp_path):
    model, patch = saved(tmp_path)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    before = state_fingerprint(model)
    patch.apply(model)
    there = printed_by(APPLY_ELSEWHERE, tmp_path, tmp_path / "state.pt").split()
    assert there == [state_fingerprint(model), before]


def test_an_empty_patch_changes_nothing(tmp_path):
    model = tiny.memory_model()
    before = state_fingerprint(model)
    MemoryPatch.between(model, model).save(tmp_path)
    MemoryPatch.load(tmp_path).apply(model)
    assert state_fingerprint(model) == before


def test_500_rows_of_1024_bfloat16_numbers_and_their_originals_take_less_than_2_2_megabytes(tmp_path):
    rows = torch.randn(2, 500, 1024).bfloat16()
    slots = torch.randperm(1024**2)[:500].sort().values
    keys = product_key_fingerprints(tiny.memory_model())[tiny.TABLE]
    MemoryPatch({"model.memory.0": TablePatch(slots, rows[0], rows[1], 1024**2, keys)}).save(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2.2e6


def test_what_json_cannot_hold_leaves_an_earlier_patch_as_it_was(tmp_path):
    model, patch = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    patch.provenance = {"model": model}
    with pytest.raises(TypeError, match="not JSON serializable"):
        patch.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Crash(BaseException):
    """Stands for a process that ends here."""


def save_and_crash(patch, folder, call):
    """Save, ending at the given call to os.fsync or os.replace, counted from 0; False when there is none."""
    calls = itertools.count()

    def or_crash(function):
        def called(*arguments):
            if next(calls) == call:
                raise Crash
            return function(*arguments)

        return called

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", or_crash(os.fsync))
        patched.setattr(os, "replace", or_crash(os.replace))
        try:
            patch.save(folder)
        except Crash:
            return True
    return False


@pytest.mark.parametrize("earlier", [True, False])
def test_a_crash_while_saving_leaves_the_old_patch_or_the_new_one(tmp_path, earlier):
    model = tiny.memory_model()
    old, new = odd_patch(model), patch_of(model, [1], torch.ones(1, 16))
    found = []
    for call in itertools.count():
        folder = tmp_path / str(call)
        if earlier:
            old.save(folder)
        if not save_and_crash(new, folder, call):
            break
        found.append(state_after(folder))
    assert len(found) == 7, "rows, config and card are each written through and renamed, the rows twice"
    before = old.fingerprint if earlier else None
    switch = found.index(new.fingerprint)
    assert found == [before] * switch + [new.fingerprint] * (7 - switch)
    assert 0 < switch < 7


def test_what_a_crash_left_is_as_safe_as_any_patch(tmp_path):
    model = tiny.memory_model()
    old, new, third = (patch_of(model, [slot], torch.ones(1, 16)) for slot in (1, 2, 3))
    for first, second in itertools.product(range(7), range(9)):
        folder = tmp_path / f"{first} {second}"
        old.save(folder)
        save_and_crash(new, folder, first)
        left = state_after(folder)
        save_and_crash(third, folder, second)
        assert state_after(folder) in (left, third.fingerprint)
        third.save(folder)
        assert state_after(folder) == third.fingerprint
        assert {path.name for path in folder.iterdir()} == FILES


def state_after(folder):
    """Fingerprint of the patch in a folder; None where there is none."""
    try:
        return MemoryPatch.load(folder).fingerprint
    except FileNotFoundError:
        return None


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    saved(tmp_path)
    saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"notes.txt"}


def flip_a_bit(folder):
    data = bytearray((folder / ROWS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / ROWS_FILE).write_bytes(data)


def truncate(folder):
    (folder / ROWS_FILE).write_bytes((folder / ROWS_FILE).read_bytes()[:-10])


def cut_to(size):
    return lambda folder: (folder / ROWS_FILE).write_bytes((folder / ROWS_FILE).read_bytes()[:size])


def lfs_pointer(name):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4096\n"
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def spoil_json(folder):
    (folder / CONFIG_FILE).write_text('{"patch_type": ')


def another_kind(folder):
    (folder / CONFIG_FILE).write_text('{"peft_type": "LORA"}')


def edit(**changes):
    """Change or, with None, drop keys of the config; those of ``table`` are the table's."""

    def spoil(folder):
        config = json.loads((folder / CONFIG_FILE).read_text())
        table = config["tables"][tiny.TABLE]
        for where, key, value in [(config, *item) for item in changes.items() if item[0] != "table"] + [
            (table, *item) for item in changes.get("table", {}).items()
        ]:
            where.pop(key, None)
            if value is not None:
                where[key] = value
        (folder / CONFIG_FILE).write_text(json.dumps(config))

    return spoil


def with_rows(**changes):
    """Exchange tensors and let the config have the right SHA-256, as somebody else's program might write it."""

    def spoil(folder):
        tensors = load_file(folder / ROWS_FILE)
        tensors.update({f"{tiny.TABLE}.{name}": tensor for name, tensor in changes.items()})
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / ROWS_FILE)
        edit(sha256=hashlib.sha256((folder / ROWS_FILE).read_bytes()).hexdigest())(folder)

    return spoil


def not_safetensors(folder):
    (folder / ROWS_FILE).write_bytes(b"no safetensors")
    edit(sha256=hashlib.sha256(b"no safetensors").hexdigest())(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip_a_bit, "not the file that .* was written with: .* download or copy both again"),
        (truncate, "is cut short, 10 bytes are missing: download or copy it again"),
        (cut_to(100), r"is cut short, \d+ bytes are missing: download or copy it again"),
        (cut_to(0), "is cut short, 8 bytes are missing"),
        (lfs_pointer(ROWS_FILE), rf"{ROWS_FILE} is a Git LFS pointer, .* `git lfs pull`"),
        (lfs_pointer(CONFIG_FILE), rf"{CONFIG_FILE} is a Git LFS pointer, .* `git lfs pull`"),
        (spoil_json, r"memory_patch_config\.json is not JSON"),
        (another_kind, "lacks patch_type 'MEMORY_PATCH'"),
        (edit(format_version=1), "is of format 1, from before the first release: make the patch again"),
        (edit(format_version=2), "is of format 2, from before the first release: make the patch again"),
        (edit(format_version=3), "is of format 3, from before the first release: make the patch again"),
        (edit(format_version=5), "is of format 5, this version of memlayer reads format 4"),
        (edit(base={"vocab_size": 50}), "was altered"),
        (edit(mode="delta"), r"unknown keys \['mode'\] and lacks \[\]"),
        (edit(provenance=None), r"unknown keys \[\] and lacks \['provenance'\]"),
        (edit(provenance={"seed": 4}), "was altered"),
        (edit(tables={}), rf"has no table for model\.memory\.0\.originals, .* of {ROWS_FILE}"),
        (edit(tables=[]), r"tables is \[\], must be an object"),
        (edit(provenance=[]), r"provenance is \[\], must be an object"),
        (edit(tables={tiny.TABLE: 5}), r"table 'model\.memory\.0' is 5, must be an object"),
        (edit(table={"num_rows": 5}), r"table 'model\.memory\.0' has num_rows 5, memory_patch\.safetensors has 4"),
        (edit(table={"width": 15}), "has width 15"),
        (edit(table={"dtype": "float16"}), "has dtype 'float16'"),
        (edit(table={"originals_sha256": "0"}), "has originals_sha256 '0'"),
        (edit(table={"unheard_of": 1}), "has unheard_of 1"),
        (edit(table={"num_slots": None}), "has num_slots None, must be of type int"),
        (edit(table={"num_slots": "64"}), "has num_slots '64', must be of type int"),
        (edit(table={"num_slots": 50}), "slots 2 to 63, the table has 50"),
        (edit(table={"num_slots": 65}), "was altered"),
        (edit(table={"product_keys": {}}), "was altered"),
        (edit(table={"product_keys": None}), "has product_keys None, must be of type dict"),
        (with_rows(rows=torch.zeros(3, 16)), r"rows of shape \(3, 16\) for 4 slots"),
        (with_rows(originals=None), r"needs model\.memory\.0\.originals"),
        (with_rows(originals=torch.zeros(4, 16)), "has originals_sha256"),
        (with_rows(extra=torch.zeros(1)), r"has no table for model\.memory\.0\.extra"),
        (with_rows(rows=torch.zeros(4, 16)), "was altered"),
        (not_safetensors, "is not a safetensors file"),
    ],
)
def test_an_altered_patch_is_not_loaded(tmp_path, spoil, message):
    saved(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        MemoryPatch.load(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, ROWS_FILE])
def test_a_missing_file_is_named(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        MemoryPatch.load(tmp_path)

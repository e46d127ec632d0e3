"""python -m memlayer.patch as a user runs it: what it shows and writes, and what it refuses in one sentence."""

import shutil
import sys

import pytest
import tiny
import torch
from commands import run
from patch_cases import patch_of

from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.decoders.looked_at import KEPT_FILE, checkpoint_fingerprint
from memlayer.patch import ROWS_FILE, MemoryPatch, __main__

SCRIPT = "memlayer/patch/__main__.py"
COUNTS = "background_counts.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder as training leaves one, sharded, with two patches of that model."""
    folder = tmp_path_factory.mktemp("folders")
    tokenizer = tiny.tokenizer(folder / "tokenizer")
    model = tiny.memory_model()
    files.save(model, tokenizer, folder / "model")
    for path in (folder / "model").glob("model*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder / "model", max_shard_size="20KB")
    (folder / "model" / COUNTS).write_bytes(b"counts")
    (folder / "model" / "trainer").mkdir()
    patch_of(model, [2, 40], torch.ones(2, tiny.WIDTH), {"seed": 1}).save(folder / "one")
    patch_of(model, [40, 63], torch.full((2, tiny.WIDTH), 3.0), {"seed": 2}).save(folder / "other")
    return folder


def fingerprint(folder):
    return state_fingerprint(files.load(folder)[0])


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_help_names_the_commands_and_what_they_take():
    done = run("-m", "memlayer.patch", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("show", "apply", "revert", "merge", "squash", "forget"):
        assert f"python -m memlayer.patch {name} " in done.stdout
    assert "PATCH MODEL OUT" in run(SCRIPT, "apply", "--help").stdout
    assert "{error,last,mean,ties}" in run(SCRIPT, "merge", "--help").stdout


def test_show_prints_the_description(folders):
    done = run(SCRIPT, "show", folders / "one")
    assert (done.returncode, done.stderr) == (0, "")
    first, rest = done.stdout.split("\n", 1)
    assert rest == MemoryPatch.load(folders / "one").describe() + "\n"
    size = sum(path.stat().st_size for path in (folders / "one").iterdir()) / 1e6
    assert first.startswith(f"{folders / 'one'}: {size:.3g} MB on disk, file of 20")


def test_apply_and_then_revert_write_the_model_with_and_without_the_patch(folders, tmp_path):
    before = tree(folders / "model")
    done = run(SCRIPT, "apply", folders / "one", folders / "model", tmp_path / "new" / "patched")
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'new' / 'patched'}\n"), done.stderr
    model, _ = files.load(folders / "model")
    MemoryPatch.load(folders / "one").apply(model)
    assert fingerprint(tmp_path / "new" / "patched") == state_fingerprint(model)
    done = run(SCRIPT, "revert", folders / "one", tmp_path / "new" / "patched", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "back") == fingerprint(folders / "model")
    assert tree(folders / "model") == before
    for folder in (tmp_path / "new" / "patched", tmp_path / "back"):
        written = tree(folder)
        # One file of weights now, and none of the shards that the model was read from.
        assert [name for name in written if name.startswith("model")] == ["model.safetensors"]
        assert {n: d for n, d in written.items() if n in (COUNTS, "tokenizer.json", "tokenizer.model")} == {
            name: data for name, data in before.items() if name in (COUNTS, "tokenizer.json", "tokenizer.model")
        }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["patched"]


def test_a_patch_is_applied_over_a_mapped_table_and_taken_back_from_one(folders, tmp_path):
    before = tree(folders / "model")
    arguments = "apply", folders / "one", folders / "model", tmp_path / "patched", "--table", "mapped"
    done = run(SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    model, _ = files.load(folders / "model")
    checkpoint_fingerprint(files.load_model(folders / "model", "mapped"))  # leaves a file that is not copied
    MemoryPatch.load(folders / "one").apply(model)
    assert fingerprint(tmp_path / "patched") == state_fingerprint(model)
    done = run(SCRIPT, "revert", folders / "one", tmp_path / "patched", tmp_path / "back", "--table", "mapped")
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "back") == fingerprint(folders / "model")
    weights = {name: data for name, data in before.items() if name.startswith("model-")}
    assert {name: data for name, data in tree(tmp_path / "back").items() if name.startswith("model-")} == weights
    (folders / "model" / KEPT_FILE).unlink()
    assert tree(folders / "model") == before


def test_a_model_folder_without_a_tokenizer_takes_a_patch_as_well(folders, tmp_path):
    tiny.memory_model().save_pretrained(tmp_path / "alone")
    done = run(SCRIPT, "apply", folders / "one", tmp_path / "alone", tmp_path / "patched")
    assert done.returncode == 0, done.stderr
    model = tiny.memory_model()
    MemoryPatch.load(folders / "one").apply(model)
    assert state_fingerprint(files.load_model(tmp_path / "patched")) == state_fingerprint(model)


def test_merge_writes_one_patch_of_several(folders, tmp_path):
    done = run(SCRIPT, "merge", folders / "one", folders / "other", tmp_path / "merged", "--on-conflict", "mean")
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'merged'}\n"), done.stderr
    table = MemoryPatch.load(tmp_path / "merged").tables[tiny.TABLE]
    assert dict(zip(table.slots.tolist(), table.rows[:, 0].tolist())) == {2: 1, 40: 2, 63: 3}


def test_squash_writes_one_patch_of_a_chain(folders, tmp_path):
    model = tiny.memory_model()
    MemoryPatch.load(folders / "one").apply(model)
    patch_of(model, [40, 50], torch.full((2, tiny.WIDTH), 5.0)).save(tmp_path / "above")
    done = run(SCRIPT, "apply", tmp_path / "above", folders / "model", tmp_path / "out")
    assert done.returncode == 1
    assert "made on top of patch" in done.stderr
    done = run(SCRIPT, "squash", folders / "one", tmp_path / "above", tmp_path / "both")
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'both'}\n"), done.stderr
    table = MemoryPatch.load(tmp_path / "both").tables[tiny.TABLE]
    assert dict(zip(table.slots.tolist(), table.rows[:, 0].tolist())) == {2: 1, 40: 5, 50: 5}


def test_any_base_applies_to_a_model_of_other_weights(folders, tmp_path):
    model = tiny.memory_model()
    model.model.embed_tokens.weight.data += 1
    model.save_pretrained(tmp_path / "model")
    arguments = "apply", folders / "one", tmp_path / "model", tmp_path / "out"
    done = run(SCRIPT, *arguments)
    assert done.returncode == 1
    assert "other weights outside the memory (in float32): any_base=True, or --any-base on the command" in done.stderr
    done = run(SCRIPT, *arguments, "--any-base")
    assert done.returncode == 0, done.stderr
    MemoryPatch.load(folders / "one").apply(model, any_base=True)
    assert state_fingerprint(files.load_model(tmp_path / "out")) == state_fingerprint(model)


def make_full(folder):
    folder.mkdir()
    (folder / "mine").write_text("kept")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "{model}"), "no memory patch in {model}: memory_patch_config.json is missing"),
        (("show", "{broken}"), "download or copy both again, they belong together"),
        (("apply", "{one}", "{one}", "{out}"), "no checkpoint in {one}: config.json is missing"),
        (("apply", "{one}", "{model}", "{full}"), "{full} exists already: name a new folder"),
        (("apply", "{one}", "{model}", "{full}/mine"), "{full}/mine exists already"),
        (("apply", "{one}", "{model}", "{full}/mine/out"), "File exists"),
        (("revert", "{one}", "{model}", "{out}"), "the patch is not applied: the model holds its originals"),
        (("merge", "{one}", "{out}"), "is nothing to merge"),
        (("squash", "{one}", "{out}"), "is nothing to squash"),
        (("squash", "{one}", "{other}", "{out}"), "patch 2 was not made on top of the ones before it"),
        (("merge", "{one}", "{other}", "{out}"), "different rows for 1 slots of table 'model.memory.0', at slot 40"),
        (("merge", "{one}", "{other}", "{full}"), "{full} exists already"),
        (("merge", "{one}", "{other}", "{out}", "--on-conflict=ties", "--density=2"), "density is 2.0"),
    ],
)
def test_bad_input_gives_one_sentence_and_writes_nothing(folders, tmp_path, arguments, message):
    names = {name: str(folders / name) for name in ("model", "one", "other")}
    names |= {name: str(tmp_path / name) for name in ("out", "full", "broken")}
    make_full(tmp_path / "full")
    MemoryPatch.load(folders / "one").save(tmp_path / "broken")
    (tmp_path / "broken" / ROWS_FILE).write_bytes(b"other rows")
    before = tree(tmp_path)
    done = run(SCRIPT, *(each.format(**names) for each in arguments))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m memlayer.patch: ")
    assert message.format(**names) in line
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_nothing_half_written(folders, tmp_path, monkeypatch, capsys):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    paths = folders / "one", folders / "model", tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [SCRIPT, "apply", *map(str, paths)])
    with pytest.raises(SystemExit, match="1"):
        __main__.main()
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"cannot write {tmp_path / 'out'}: no space is left on the device; make room" in printed.err


def test_forget_turns_a_patch_round(folders, tmp_path):
    done = run(SCRIPT, "forget", folders / "one", tmp_path / "out", "--strength", "0.5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"wrote {tmp_path / 'out'}")
    one, out = (MemoryPatch.load(folder).tables[tiny.TABLE] for folder in (folders / "one", tmp_path / "out"))
    assert torch.equal(out.rows, one.originals - 0.5 * (one.rows - one.originals))
    refused = run(SCRIPT, "forget", folders / "one", tmp_path / "none", "--strength", "0")
    assert refused.returncode == 1
    assert "strength is 0, must be above 0" in refused.stderr
    assert not (tmp_path / "none").exists()

"""A table mapped from its file gives the same bits as one in memory, and what is written never reaches the file."""

import copy
import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from finetuning import OPTIMIZERS, learn
from patch_cases import patch_of

from memlayer.decoders import files, looked_at, mapped
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.decoders.looked_at import KEPT_FILE, checkpoint_fingerprint, tables_are_finite
from memlayer.decoders.mapped import MappedTable, TensorFile, mapped_tables
from memlayer.methods import METHODS
from memlayer.patch import patches

# Of rows of 48 numbers several lie on a page, and some on two.
MEMORY = {"num_keys": 48, "value_width": 48}


@pytest.fixture(params=["float32", "bfloat16"])
def folder(request, tmp_path):
    tiny.memory_model(dtype=request.param, **MEMORY).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def sha256_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_a_mapped_model_is_the_loaded_one_to_the_bit(folder):
    loaded, of_file = (files.load_model(folder, table) for table in ("loaded", "mapped"))
    (table,) = mapped_tables(of_file).values()
    assert isinstance(table, MappedTable)
    assert not mapped_tables(loaded)
    assert state_fingerprint(loaded) == state_fingerprint(of_file) == checkpoint_fingerprint(of_file)
    assert loaded.config.to_dict() == of_file.config.to_dict()
    assert loaded.generation_config.to_dict() == of_file.generation_config.to_dict()
    batch = tiny.inputs(tiny.batch())
    assert torch.equal(loaded(**batch).logits, of_file(**batch).logits)


def test_a_checkpoint_in_shards_is_mapped(tmp_path):
    model = tiny.memory_model(**MEMORY)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(files.weight_files(tmp_path)) > 1
    assert state_fingerprint(files.load_model(tmp_path, "mapped")) == state_fingerprint(model)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_learning_into_a_mapped_table_writes_the_same_patch_and_nothing_into_the_file(folder, optimizer):
    before, batches = sha256_of(folder), [tiny.batch(seed=seed) for seed in range(3)]
    found = {}
    for table in ("loaded", "mapped"):
        model = files.load_model(folder, table)
        finetuner, selected = learn(model, batches, make=OPTIMIZERS[optimizer])
        found[table] = finetuner.detach(), selected, state_fingerprint(model), files.numbers_changed(model, folder)
    (ours, our_slots, our_bits, changed), (theirs, their_slots, their_bits, _) = found["mapped"], found["loaded"]
    assert ours.fingerprint == theirs.fingerprint
    assert ours.num_rows > 0
    assert all(torch.equal(one[tiny.TABLE], other[tiny.TABLE]) for one, other in zip(our_slots, their_slots))
    assert our_bits == their_bits != state_fingerprint(files.load_model(folder, "loaded"))
    assert changed == found["loaded"][3] > 0
    assert sha256_of(folder) == before


def test_a_patch_is_applied_over_a_mapped_table_and_taken_back(folder):
    model = files.load_model(folder, "mapped")
    patch = patch_of(model, [2, 40, 2303], torch.ones(3, 48))
    before = checkpoint_fingerprint(model)
    with patches(model, [patch]):
        assert state_fingerprint(model) != before
        assert checkpoint_fingerprint(model) == before, "of the file, which stays as it is"
        assert files.numbers_changed(model, folder) == 3 * 48
    assert state_fingerprint(model) == before
    assert files.numbers_changed(model, folder) == 0


def test_the_slots_written_are_found_by_their_pages(folder):
    model = files.load_model(folder, "mapped")
    (table,) = mapped_tables(model).values()
    table.weight.sum()  # reading makes no page the process's own
    assert len(table.slots_written()) == 0
    written = torch.tensor([0, 1000, 2303])
    with torch.no_grad():
        table.weight[written] += 1
    found = table.slots_written()
    assert torch.isin(written, found).all()
    assert len(found) < 2304 // 2
    assert torch.equal(found, found.unique())


def test_where_the_system_tells_no_pages_every_slot_counts_as_written(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(mapped, "PAGEMAP", tmp_path / "none")
    model = files.load_model(folder, "mapped")
    with torch.no_grad():
        mapped_tables(model)[f"{tiny.TABLE}.weight"].weight[7] += 1
    assert files.numbers_changed(model, folder) == 48


def test_the_whole_table_is_read_once_and_again_only_after_a_write(folder, monkeypatch):
    read = []
    blocks = TensorFile.blocks
    monkeypatch.setattr(TensorFile, "blocks", lambda self, name: read.append(name) or blocks(self, name))
    monkeypatch.setattr(mapped, "BLOCK_BYTES", 1000)  # several blocks, of which the last is shorter
    first = checkpoint_fingerprint(files.load_model(folder, "mapped"))
    assert checkpoint_fingerprint(files.load_model(folder, "mapped")) == first
    assert len(read) == 1
    tiny.memory_model(seed=1, **MEMORY).save_pretrained(folder)
    again = files.load_model(folder, "mapped")
    assert checkpoint_fingerprint(again) == state_fingerprint(again) != first
    assert len(read) == 2


def test_what_is_kept_of_a_file_is_read_by_size_and_time_and_nothing_else_is_believed(folder):
    model = files.load_model(folder, "mapped")
    right = checkpoint_fingerprint(model)
    for wrong in ("{}", "no JSON", json.dumps({"state_sha256": "0", "finite": True, "files": {}})):
        (folder / KEPT_FILE).write_text(wrong)
        assert checkpoint_fingerprint(files.load_model(folder, "mapped")) == right


@pytest.mark.parametrize("where", ["file", "written"])
def test_a_mapped_table_that_is_not_finite_is_seen(folder, where):
    if where == "file":
        spoiled = files.load_model(folder, "loaded")
        with torch.no_grad():
            spoiled.get_submodule(tiny.TABLE).weight[1000, 3] = torch.inf
        spoiled.save_pretrained(folder)
    model = files.load_model(folder, "mapped")
    if where == "written":
        assert tables_are_finite(model)
        with torch.no_grad():
            model.get_submodule(tiny.TABLE).weight[1000, 3] = torch.nan
    assert not tables_are_finite(model)


def test_a_mapped_model_is_written_as_it_is_and_loads_on_any_path(folder, tmp_path):
    model = files.load_model(folder, "mapped")
    patch_of(model, [2, 40, 2303], torch.ones(3, 48)).apply(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1
    files.save_model(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")  # transformers' own
    for written in ("ours", "theirs"):
        for table in ("loaded", "mapped"):
            again = files.load_model(tmp_path / written, table)
            assert state_fingerprint(again) == state_fingerprint(model)
            assert again.config.memory == model.config.memory
            assert again.config.memory_patches == model.config.memory_patches


def test_a_hole_in_a_file_stays_a_hole_when_the_model_is_written(tmp_path):
    model = tiny.memory_model(num_keys=128, value_width=256, mode="add")  # 16 MB of zeros
    model.save_pretrained(tmp_path / "dense")
    subprocess.run(["cp", "-r", "--sparse=always", tmp_path / "dense", tmp_path / "sparse"], check=True)
    of_file = files.load_model(tmp_path / "sparse", "mapped")
    patch_of(of_file, [5], torch.ones(1, 256)).apply(of_file)
    files.save_model(of_file, tmp_path / "written")
    (path,) = files.weight_files(tmp_path / "written")
    assert path.stat().st_blocks * 512 < path.stat().st_size / 4
    patch_of(model, [5], torch.ones(1, 256)).apply(model)
    assert state_fingerprint(files.load_model(tmp_path / "written", "loaded")) == state_fingerprint(model)


def test_a_model_is_mapped_where_memory_is_too_small_for_it(folder, monkeypatch, caplog):
    assert not mapped_tables(files.load_model(folder))
    monkeypatch.setattr(mapped, "available_bytes", lambda: 1000)
    assert mapped_tables(files.load_model(folder))
    assert "is larger than the memory that is free: its tables are mapped from their file" in caplog.text
    assert not mapped_tables(files.load_model(folder, "loaded"))


def test_what_needs_a_whole_table_is_refused(folder):
    model = files.load_model(folder, "mapped")
    with pytest.raises(
        ValueError, match=r"full finetuning trains whole tables: table 'model\.memory\.0\.weight' is mapped"
    ):
        METHODS["full"](model, None, None)
    with pytest.raises(ValueError, match="dense memory finetuning trains whole tables: table"):
        METHODS["dense_memory"](model, None, None)
    with pytest.raises(ValueError, match=r"it cannot be made torch\.float64"):
        model.double()
    with pytest.raises(ValueError, match="a copy would be all of it in memory"):
        copy.deepcopy(model)


def test_the_table_stays_where_it_is_when_the_model_moves(folder):
    model = files.load_model(folder, "mapped")
    model.to("meta")
    assert model.get_submodule(tiny.TABLE).weight.device.type == "cpu"
    assert model.lm_head.weight.is_meta


@pytest.mark.parametrize(("cut", "words"), [(-10, "10 bytes are missing"), (50, "its header is no JSON")])
def test_a_damaged_file_is_refused(folder, cut, words):
    (path,) = files.weight_files(folder)
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(ValueError, match=words):
        TensorFile(path)


def test_a_dtype_that_is_not_known_is_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(ValueError, match="holds tensors of dtype F4"):
        TensorFile(tmp_path / "model.safetensors")


def test_the_looked_at_file_names_the_weights_alone(folder):
    model = files.load_model(folder, "mapped")
    found = looked_at.look_at(model)
    assert found.files.keys() == {path.name for path in files.weight_files(folder)}


def test_a_table_of_twice_the_machines_memory_is_read_and_written_by_rows(tmp_path):
    told = Path("/proc/meminfo")
    memory = int(told.read_text(encoding="utf-8").split()[1]) << 10 if told.exists() else 64 << 30
    num_slots = 2 * memory // 4096
    entry = {"dtype": "F32", "shape": [num_slots, 1024], "data_offsets": [0, num_slots * 4096]}
    header = json.dumps({"model.memory.0.weight": entry}).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + num_slots * 4096)  # a hole, which takes no disk
        except OSError as error:
            pytest.skip(f"no sparse file of {num_slots * 4096:,} bytes here: {error}")
    table = MappedTable(1, 1024)
    table.file, table.name = TensorFile(path), "model.memory.0.weight"
    table.weight = torch.nn.Parameter(table.file.map(table.name), requires_grad=False)
    table.num_embeddings = num_slots
    slots, weights = torch.tensor([[0, num_slots // 2, num_slots - 1]]), torch.tensor([[1.0, 2.0, 3.0]])
    assert not table(slots, weights).any()
    table.weight[slots[0]] = torch.eye(3, 1024)
    assert table(slots, weights)[0, :4].tolist() == [1, 2, 3, 0]
    written = table.slots_written()
    assert torch.isin(slots[0], written).all()
    assert len(written) < 10
    assert path.stat().st_blocks * 512 < 1 << 20
    assert not table.file.map(table.name)[slots[0]].any()

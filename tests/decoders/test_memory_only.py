"""Memory saved beside a base model is the same model again, and another base model is refused."""

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from memlayer import MemoryConfig, add_memory, load_memory, save_memory
from memlayer.decoders.attach import memory_parameters
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.decoders.memory_only import CONFIG_FILE


@pytest.fixture
def base(tmp_path):
    tiny.decoder().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def with_memory(base, mode="add", share=False, dtype=torch.float32):
    model = type(tiny.decoder()).from_pretrained(base, dtype=dtype)
    add_memory(model, MemoryConfig([0, 2], 8, 2, 3, mode=mode, share=share))
    for parameter in memory_parameters(model).values():
        parameter.data.add_(0.1)
    return model


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "per layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beside_a_base_model_is_the_same_model_to_the_bit(base, tmp_path, mode, share, dtype):
    model = with_memory(base, mode, share, dtype)
    save_memory(model, tmp_path / "memory", max_shard_size="2KB")
    loaded = load_memory(tmp_path / "memory")
    assert type(loaded) is type(model)
    assert state_fingerprint(loaded) == state_fingerprint(model)
    ids = tiny.batch()["input_ids"]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_only_what_memory_brought_is_written(base, tmp_path):
    model = with_memory(base)
    save_memory(model, tmp_path / "memory")
    assert {path.name for path in (tmp_path / "memory").iterdir()} == {CONFIG_FILE, "memory.safetensors"}
    size = sum(p.numel() * p.element_size() for p in memory_parameters(model).values())
    assert size <= (tmp_path / "memory" / "memory.safetensors").stat().st_size <= size + 4096


def test_a_base_model_that_has_moved_is_named_anew(base, tmp_path):
    model = with_memory(base)
    save_memory(model, tmp_path / "memory")
    base.rename(tmp_path / "moved")
    loaded = load_memory(tmp_path / "memory", base_model=str(tmp_path / "moved"))
    assert state_fingerprint(loaded) == state_fingerprint(model)


def test_another_base_model_is_refused(base, tmp_path):
    save_memory(with_memory(base), tmp_path / "memory")
    other = tiny.decoder()
    other.lm_head.weight.data[3, 2] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other is not the base model that the memory in .*memory was made for"):
        load_memory(tmp_path / "memory", base_model=str(tmp_path / "other"))


def test_a_model_from_nowhere_needs_its_base_model_named(tmp_path):
    model = add_memory(tiny.decoder(), MemoryConfig([1], 8, 2, 3))
    with pytest.raises(ValueError, match="say what base_model is"):
        save_memory(model, tmp_path)


def test_a_base_model_that_has_memory_itself_is_refused_before_anything_is_written(base, tmp_path):
    with_memory(base).save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    for named in (None, str(tmp_path / "whole")):
        with pytest.raises(ValueError, match=r"whole has memory already, .* say what base_model is"):
            save_memory(loaded, tmp_path / "memory", base_model=named)
    assert not (tmp_path / "memory").exists()
    save_memory(loaded, tmp_path / "memory", base_model=str(base))
    assert state_fingerprint(load_memory(tmp_path / "memory")) == state_fingerprint(loaded)


def test_a_base_named_by_a_relative_path_is_found_from_elsewhere_and_after_moving_both(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = with_memory("base")
    save_memory(model, "runs/memory")
    (tmp_path / "moved").mkdir()
    for name in ("base", "runs"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    monkeypatch.chdir("/")
    assert state_fingerprint(load_memory(tmp_path / "moved" / "runs" / "memory")) == state_fingerprint(model)
    (tmp_path / "moved" / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"not in \S+/moved/base nor in base: say where it is"):
        load_memory(tmp_path / "moved" / "runs" / "memory")


def test_code_of_a_base_that_only_the_folder_names_is_not_run(base, tmp_path):
    save_memory(with_memory(base), tmp_path / "memory")
    with pytest.raises(ValueError, match=r"trust_remote_code would run the code of .*base, which .*memory names"):
        load_memory(tmp_path / "memory", trust_remote_code=True)
    load_memory(tmp_path / "memory", base_model=str(base), trust_remote_code=True)


def test_a_dtype_asked_for_is_refused(base, tmp_path):
    save_memory(with_memory(base), tmp_path / "memory")
    with pytest.raises(ValueError, match="its base in float32: convert the loaded model"):
        load_memory(tmp_path / "memory", dtype=torch.bfloat16)


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "has format 1, expected 2"),
        ({"memory": {"layers": [0, 1], "num_keys": 8, "num_heads": 2, "top_k": 3, "mode": "add"}}, "is in one of them"),
        (
            {"memory": {"layers": [0, 2], "num_keys": 9, "num_heads": 2, "top_k": 3, "mode": "add", "share": False}},
            r"is \(2, 2, 8, 4\), expected \(2, 2, 9, 4\)",
        ),
        ({"memory": {"layer": [0]}}, "unknown key 'layer'"),
        ({"memory": {"layers": "02"}}, "memory.layers is '02', must be a list of whole numbers"),
        ({"dtype": "flot32"}, "has dtype 'flot32', must be one of float32"),
        ({"dtype": "nn"}, "has dtype 'nn', must be one of float32"),
    ],
)
def test_what_does_not_fit_is_refused(base, tmp_path, changes, message):
    save_memory(with_memory(base), tmp_path / "memory")
    change_config(tmp_path / "memory", **changes)
    with pytest.raises(ValueError, match=message):
        load_memory(tmp_path / "memory")


def test_missing_and_damaged_files_are_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        load_memory(base)
    save_memory(with_memory(base), tmp_path / "memory")
    weights = tmp_path / "memory" / "memory.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"memory\.safetensors is damaged"):
        load_memory(tmp_path / "memory")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"memory\.safetensors is missing"):
        load_memory(tmp_path / "memory")

"""A saved memory model is the same model again, and what does not fit is refused."""

import json

import pytest
import tiny
import torch
from commands import printed_by
from transformers import AutoModelForCausalLM

from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.layers.config import MemoryConfig

SIZES = {"num_layers": 3, "width": 16, "num_heads": 2, "ffn_width": 32, "max_length": 32}
IDS = torch.randint(4, 290, (2, 9), generator=torch.Generator().manual_seed(0))


def built(tokenizer, seed=0, **memory):
    torch.manual_seed(seed)
    settings = {"layers": [1], "num_keys": 8, "num_heads": 2, "top_k": 3, **memory}
    return files.build(MemoryConfig(**settings), tokenizer, **SIZES).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_a_built_model_fits_its_tokenizer_and_its_config(tokenizer):
    model = built(tokenizer)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 16)
    ids = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert ids == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


LOAD_ELSEWHERE = """
import sys, torch
from memlayer.decoders import files
model, tokenizer = files.load(sys.argv[1])
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save({"state": model.state_dict(), "logits": model(input_ids=ids).logits}, sys.argv[3])
print(model.training, tokenizer.encode("where is Zürich?"))
"""


def test_a_saved_model_is_loaded_to_the_bit_in_a_fresh_process(tokenizer, tmp_path):
    model = built(tokenizer, layers=[0, 2], share=False)
    files.save(model, tokenizer, tmp_path / "checkpoint")
    torch.save(IDS, tmp_path / "ids.pt")
    printed = printed_by(LOAD_ELSEWHERE, tmp_path / "checkpoint", tmp_path / "ids.pt", tmp_path / "loaded.pt")
    loaded = torch.load(tmp_path / "loaded.pt")
    assert loaded["state"].keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded["state"][name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), loaded["logits"])
    assert printed.strip() == f"False {tokenizer.encode('where is Zürich?')}"


@pytest.mark.parametrize("settings", [{"mode": "add"}, {"layers": [0, 2]}, {"value_width": 10, "key_width": 4}])
def test_every_kind_of_memory_is_loaded_to_the_bit(tokenizer, tmp_path, settings):
    model = built(tokenizer, **settings)
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    files.save(model, tokenizer, tmp_path)
    loaded, _ = files.load(tmp_path)
    assert state_fingerprint(loaded) == state_fingerprint(model)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.memory == model.config.memory


def test_a_bfloat16_model_is_loaded_in_bfloat16(tokenizer, tmp_path):
    model = built(tokenizer).bfloat16()
    files.save(model, tokenizer, tmp_path)
    loaded, _ = files.load(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert state_fingerprint(loaded) == state_fingerprint(model)


def test_a_loaded_model_ties_its_embeddings_and_trains(tokenizer, tmp_path):
    files.save(built(tokenizer), tokenizer, tmp_path)
    loaded, _ = files.load(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    assert not loaded.model.memory[0].weight.grad.is_sparse


def test_a_checkpoint_can_be_saved_again_into_its_own_folder_and_into_another(tokenizer, tmp_path):
    files.save(built(tokenizer), tokenizer, tmp_path / "one")
    model, loaded_tokenizer = files.load(tmp_path / "one")
    for folder in ("one", "two"):
        files.save(model, loaded_tokenizer, tmp_path / folder)
        again, _ = files.load(tmp_path / folder)
        assert state_fingerprint(again) == state_fingerprint(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tokenizer, tmp_path, name):
    files.save(built(tokenizer), tokenizer, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}"):
        files.load(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nowhere: config\.json is missing"):
        files.load(tmp_path / "nowhere")


def test_a_checkpoint_without_memory_is_refused(tokenizer, tmp_path):
    tiny.decoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no memory layer"):
        files.load(tmp_path)


def set_memory(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["memory"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_keys": 9}, r"model\.memory\.0\.weight is \(64, 16\), expected \(81, 16\)"),
        ({"layers": [2]}, r"9 missing \(.*layers\.1\.mlp\.down_proj.*9 not in the model \(.*layers\.1\.mlp\.gate"),
        ({"share": False, "layers": [1, 2]}, r"model\.layers\.2\.mlp\.gate\.weight"),
        ({"num_slots": 64}, "num_slots"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_by_name(tokenizer, tmp_path, changes, message):
    files.save(built(tokenizer), tokenizer, tmp_path)
    set_memory(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        files.load(tmp_path)


def test_truncated_weights_are_refused_by_name(tokenizer, tmp_path):
    files.save(built(tokenizer), tokenizer, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        files.load(tmp_path)


def test_transformers_without_memlayer_refuses_the_folder_rather_than_leave_the_memory_out(tokenizer, tmp_path):
    files.save(built(tokenizer), tokenizer, tmp_path)
    program = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    with pytest.raises(AssertionError, match="model type `memlayer` but Transformers does not recognize"):
        tiny.run_python(program, tmp_path)


def test_transformers_with_memlayer_imported_loads_the_folder(tokenizer, tmp_path):
    model = built(tokenizer)
    files.save(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert state_fingerprint(loaded) == state_fingerprint(model)


def test_a_saved_model_is_checked_against_the_one_in_memory(tokenizer, tmp_path):
    model = built(tokenizer)
    files.save(model, tokenizer, tmp_path)
    files.check_saved(model, tmp_path)
    with torch.no_grad():
        model.model.memory[0].weight[3, 2] += 1
    with pytest.raises(ValueError, match=r"does not hold this model: 1 tensors differ, model\.memory\.0\.weight first"):
        files.check_saved(model, tmp_path)

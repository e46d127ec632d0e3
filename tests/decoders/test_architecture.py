"""Any config of transformers is an architecture, and a setting that it does not know is refused."""

import pytest
import tiny
import torch
from families import FAMILIES, decoder
from transformers import AutoConfig

from memlayer.decoders.architecture import architecture, random_decoder
from memlayer.decoders.attach import add_memory
from memlayer.layers.config import MemoryConfig

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_written_out_by_its_own_names(family, tokenizer):
    kind, sizes = FAMILIES[family]
    settings = {name: value for name, value in sizes.items() if name != "vocab_size" and not name.endswith("token_id")}
    config = architecture(None, {"model_type": kind.model_type, **settings}, tokenizer, 32)
    assert type(config) is kind
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)
    model = random_decoder(config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(getattr(model.config, name) == value for name, value in settings.items())


def test_a_config_in_a_folder_is_taken_and_settings_change_it(tmp_path, tokenizer):
    decoder("qwen2", dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = architecture(str(tmp_path), {"hidden_size": 24, "rope_parameters": {"rope_theta": 5e5}}, tokenizer, 64)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("qwen2", saved.num_hidden_layers, 24)
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.vocab_size == len(tokenizer)
    assert random_decoder(config).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (None, SMALL, "model.config is not set and model.settings has no model_type: one of them names the family"),
        (None, {"model_type": "lama"}, "model.settings.model_type is 'lama', no family of transformers"),
        (
            None,
            {"model_type": "llama", "hidden_sise": 8},
            "hidden_sise is no setting of LlamaConfig; did you mean hidden_s",
        ),
        (None, {"model_type": "llama", "hidden_size": "wide"}, "model.settings do not fit: .*hidden_size"),
        (None, {"model_type": "llama", **SMALL, "vocab_size": 5}, "vocab_size is 5, the tokenizer has 340 tokens"),
        (
            None,
            {"model_type": "llama", **SMALL, "max_position_embeddings": 8},
            "text.length is 64, the model has 8 pos",
        ),
        ("absent/model", {}, "model.config is absent/model: "),
        ("folder", {"model_type": "llama"}, "has model_type: one decides the family"),
        (
            "folder of llama",
            {"rope_theta": 5e5},
            "rope_theta is no setting of LlamaConfig; did you mean rope_parameters",
        ),
        ("with memory", {}, "which has memory: name the config of a decoder without"),
    ],
)
def test_what_is_no_architecture_is_refused_in_one_sentence(tmp_path, tokenizer, name, settings, message):
    if name == "with memory":
        name = str(tmp_path)
        add_memory(decoder("llama"), MemoryConfig(layers=[1], num_keys=6, top_k=2)).save_pretrained(name)
    if name == "folder of llama":
        name = str(tmp_path)
        decoder("llama").config.save_pretrained(name)
    with pytest.raises(ValueError, match=message) as refused:
        architecture(name, settings, tokenizer, 64)
    assert "\n" not in str(refused.value)


def test_what_is_no_decoder_is_refused(tokenizer):
    config = architecture(None, {"model_type": "vit", "hidden_size": 16}, tokenizer, 64)
    with pytest.raises(ValueError, match="ViTConfig makes no decoder"):
        random_decoder(config)

"""Where memory goes is found by looking at a decoder, and what does not look like one is refused in a sentence."""

import pytest
import tiny
import torch
from families import learned, logits, randomised, tokens, with_memory
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers import models as hf

from memlayer.decoders.attach import add_memory, memory_layers, remove_memory
from memlayer.layers.config import MemoryConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_SIZES = {"n_embd": 16, "n_layer": 3, "n_head": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}

# Decoders that nobody told memlayer about.
OTHERS = {
    "StableLM": (hf.StableLmConfig, {}),
    "Starcoder2": (hf.Starcoder2Config, {}),
    "Cohere": (hf.CohereConfig, {}),
    "OLMo": (hf.OlmoConfig, {}),
    "Phi": (hf.PhiConfig, {}),
    "GPT-J": (hf.GPTJConfig, {**GPT_SIZES, "rotary_dim": 4}),
    "GPT-BigCode": (hf.GPTBigCodeConfig, GPT_SIZES),
    "Falcon": (hf.FalconConfig, {}),
    "Mixtral": (hf.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3-MoE": (hf.Qwen3MoeConfig, EXPERTS),
}


def built(auto_class, config_class, **settings):
    """A random model of a few thousand numbers."""
    torch.manual_seed(0)
    return randomised(auto_class.from_config(config_class(**{**SIZES, **settings}))).eval()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_a_decoder_that_looks_like_the_others_takes_memory(name, mode):
    config_class, settings = OTHERS[name]
    model = built(AutoModelForCausalLM, config_class, **settings)
    before, state = logits(model, tokens(2, 9)), tiny.snapshot(model)
    with_memory(model, mode)
    assert torch.equal(before, logits(model, tokens(2, 9))) == (mode == "add")
    assert len(memory_layers(model)) == 2
    remove_memory(model)
    assert torch.equal(before, logits(model, tokens(2, 9)))
    assert model.state_dict().keys() == state.keys()


CAUSAL, MASKED, SEQ2SEQ = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
T5_SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 3}
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size_mlp": 24}
MPT_SIZES = {"d_model": 16, "n_heads": 2, "n_layers": 3}
LOOKED_FOR = r"looked for a list of 3 layers \(config.num_hidden_layers\) with a block named mlp or feed_forward or ffn"
REFUSED = {
    "BLOOM": (CAUSAL, hf.BloomConfig, {}, r"BloomForCausalLM\.transformer\.h\.0\.mlp takes hidden_states, residual"),
    "MPT": (CAUSAL, hf.MptConfig, MPT_SIZES, r"transformer\.blocks\.0\.ffn takes hidden_states, residual"),
    "OPT": (CAUSAL, hf.OPTConfig, {"word_embed_proj_dim": 16}, f"memory in OPTForCausalLM: {LOOKED_FOR}, found none"),
    "Mamba": (CAUSAL, hf.MambaConfig, {}, f"memory in MambaForCausalLM: {LOOKED_FOR}, found none"),
    "BERT": (MASKED, hf.BertConfig, {}, f"memory in BertForMaskedLM: {LOOKED_FOR}, found none"),
    "ModernBERT": (MASKED, hf.ModernBertConfig, {}, "AutoModelForCausalLM has no model for ModernBertConfig"),
    "T5": (SEQ2SEQ, hf.T5Config, T5_SIZES, "T5ForConditionalGeneration has an encoder: .* decoders only"),
    "Llama 4": (CAUSAL, hf.Llama4TextConfig, ROUTED, r"layers\.0\.feed_forward returns a tuple: .* beside it"),
    "gpt-oss": (CAUSAL, hf.GptOssConfig, ROUTED, r"GptOssForCausalLM\.model\.layers\.0\.mlp returns a tuple: "),
    "a Llama without a head": (AutoModel, hf.LlamaConfig, {}, "LlamaModel has no language modelling head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_decoder_with_such_blocks_is_refused_with_what_was_looked_for(name):
    auto_class, config_class, settings, message = REFUSED[name]
    model = built(auto_class, config_class, **settings)
    model_class, state = type(model), tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        add_memory(model, MemoryConfig([0], num_keys=6, top_k=2))
    assert type(model) is model_class
    assert model.state_dict().keys() == state.keys()


def gpt_oss():
    return built(CAUSAL, hf.GptOssConfig, **ROUTED)


def test_memory_beside_a_block_that_returns_a_tuple_leaks_nothing_between_the_rows_of_a_batch(tmp_path):
    base, ids = gpt_oss(), tokens(2, 9)
    model = with_memory(gpt_oss(), "add")
    assert torch.equal(logits(model, ids), logits(base, ids))
    learned(model)
    before = logits(model, ids)
    others = torch.cat([tokens(1, 9, seed=1), ids[1:]])
    # float32: experts sum in an order that depends on the batch, as they do without memory.
    torch.testing.assert_close(logits(model, others)[1], before[1], rtol=1e-4, atol=1e-4)
    for row in range(2):
        torch.testing.assert_close(logits(model, ids[row : row + 1])[0], before[row], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, ids[:, :5]), before[:, :5], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = CAUSAL.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), before)
    remove_memory(model)
    assert torch.equal(logits(model, ids), logits(base, ids))


def test_a_block_of_another_shape_is_refused():
    model = built(CAUSAL, hf.Llama4TextConfig, **ROUTED)
    with pytest.raises(ValueError, match=r"feed_forward gives \(6, 16\) for hidden states of shape \(2, 3, 16\)"):
        add_memory(model, MemoryConfig([0], num_keys=6, top_k=2, mode="add"))


class MixesTheBatch(torch.nn.Module):
    """Somebody's block that normalises over the batch."""

    def forward(self, hidden):
        return hidden - hidden.mean(0)


def test_a_block_that_depends_on_the_rest_of_the_batch_is_refused():
    model = built(CAUSAL, hf.LlamaConfig)
    model.model.layers[1].mlp = MixesTheBatch()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp gives for a token depends on the other tokens of the batch"):
        add_memory(model, MemoryConfig([1], num_keys=6, top_k=2, mode="add"))
    add_memory(model, MemoryConfig([0], num_keys=6, top_k=2, mode="add"))

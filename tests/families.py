"""The decoder families that memory is attached to, each as a random model of a few thousand numbers.

No parameter keeps the value it is initialised to: with biases of zero and norms of one, two models that differ
there would give the same logits.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import models as hf

from memlayer.decoders.attach import add_memory, memory_parameters
from memlayer.layers.config import MemoryConfig
from memlayer.layers.optimizer import RowAdamW

VOCAB, WIDTH, FFN_WIDTH, NUM_LAYERS, MAX_LENGTH = 64, 16, 24, 3, 64
BOS, EOS, PAD = 1, 2, 3
# Shorter than the sequences of the tests, so that layers with a window do drop what lies before it.
WINDOW = 6

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": FFN_WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}
_WINDOWED = {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_GPT2_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_inner": FFN_WIDTH,
    "n_layer": NUM_LAYERS,
    "n_head": 2,
    "n_positions": MAX_LENGTH,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

# Family -> (config class, settings). Dropout is off, as two forward passes in training are compared.
FAMILIES = {
    "llama": (hf.LlamaConfig, _GROUPED),
    "mistral": (hf.MistralConfig, _WINDOWED),
    "qwen2": (hf.Qwen2Config, _GROUPED),
    "qwen3": (hf.Qwen3Config, {**_GROUPED, "head_dim": 8}),
    "gemma2": (hf.Gemma2Config, {**_WINDOWED, "query_pre_attn_scalar": 8}),
    "gemma3": (hf.Gemma3TextConfig, {**_WINDOWED, "query_pre_attn_scalar": 8, "layer_types": _ALTERNATING}),
    "olmo2": (hf.Olmo2Config, _GROUPED),
    "phi3": (hf.Phi3Config, _GROUPED),
    "smollm3": (hf.SmolLM3Config, {**_GROUPED, "no_rope_layers": [1, 0, 1]}),
    "granite": (hf.GraniteConfig, {**_GROUPED, "residual_multiplier": 0.7, "logits_scaling": 2.0}),
    "gpt_neox": (hf.GPTNeoXConfig, _SIZES),
    "gpt2": (hf.GPT2Config, _GPT2_SIZES),
}

_EXPERTS = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

# Mixtures of experts: transformers renames and splits the experts of all of these on the way to disk.
MIXTURES = {
    "mixtral": (hf.MixtralConfig, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (hf.Qwen2MoeConfig, {**_EXPERTS, "shared_expert_intermediate_size": 8}),
    "qwen3_moe": (hf.Qwen3MoeConfig, {**_EXPERTS, "head_dim": 8}),
    "olmoe": (hf.OlmoeConfig, _EXPERTS),
    "deepseek_v3": (
        hf.DeepseekV3Config,
        {**_EXPERTS, **_LATENT, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    ),
}

# Families that transformers builds in a way of their own.
PECULIAR = {
    "internlm3": (hf.InternLM3Config, _GROUPED),  # its class is Llama's, its config is not
    "falcon_h1": (  # loading makes a buffer of the layers in the module above them
        hf.FalconH1Config,
        {**_GROUPED, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8},
    ),
}


def decoder(
    family: str, tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0, **settings
) -> PreTrainedModel:
    """A random model of one of the families without memory, in evaluation mode."""
    config_class, sizes = {**FAMILIES, **MIXTURES, **PECULIAR}[family]
    config = config_class(**{**sizes, "tie_word_embeddings": tied, **settings})
    return randomised(AutoModelForCausalLM.from_config(config, dtype=dtype), seed).eval()


@torch.no_grad()
def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draw every parameter anew: matrices wide enough that logits depend on them, vectors around their start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.3 if parameter.ndim > 1 else parameter + noise * 0.2)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(PAD + 1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def with_memory(model: PreTrainedModel, mode: str = "replace", share: bool = True, **settings) -> PreTrainedModel:
    """Attach two memory layers of 36 slots, of which a token reads 4, and draw new keys and values.

    In mode "add" the output projections stay zero, as ``add_memory`` leaves them.
    """
    settings = {"layers": [0, 2], "num_keys": 6, "num_heads": 2, "top_k": 2, "value_width": 12, **settings}
    torch.manual_seed(0)
    return add_memory(model, MemoryConfig(mode=mode, share=share, **settings)).eval()


def learned(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """Draw every memory parameter anew, so that logits depend on all of them in either mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in memory_parameters(model).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def train(model: PreTrainedModel, parameters: Iterable[nn.Parameter], steps: int = 2) -> None:
    """Optimizer steps on these parameters; two, as in mode "add" a table has no gradient until the first is done."""
    model.train()
    optimizer = RowAdamW(list(parameters), lr=0.05, weight_decay=0.0)
    for step in range(steps):
        ids = tokens(2, 10, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: Tensor, **inputs) -> Tensor:
    """Logits of a forward pass, shape (batch, sequence, vocabulary)."""
    return model(input_ids=input_ids, **inputs).logits


def generate(model: PreTrainedModel, input_ids: Tensor, **settings) -> Tensor:
    """Greedy continuation by 8 tokens whatever they are; returns the new tokens alone."""
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **settings}
    return model.generate(input_ids, **settings)[:, input_ids.shape[1] :]


def settings_of(config: PreTrainedConfig) -> dict:
    """All that a config says except the folder it was read from."""
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def described(model: PreTrainedModel) -> dict:
    """All there is to compare of two models: class, config, every tensor, logits and generated tokens."""
    return {
        "class": type(model).__name__,
        "config": settings_of(model.config),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "logits": logits(model, tokens(2, 10)),
        "generated": generate(model, tokens(2, 5)),
    }

"""Try memory in every causal language model of the installed transformers and write docs/families.md.

    python tools/family_table.py                 all families; goes on where it was stopped
    python tools/family_table.py llama mixtral   these alone, tried anew

Each family is a random model of a small config, made by setting the size fields that configs have in common, and is
tried in a process of its own. A model is saved and loaded first, as a user's base is; then memory is attached, filled
with random numbers, saved, loaded, trained by the Trainer with an interruption, and removed. What is compared is
compared to the last bit, logits on the CPU in float32.
"""

import argparse
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PrinterCallback, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from memlayer import MemoryConfig, add_memory, remove_memory
from memlayer.decoders.attach import memory_parameters
from memlayer.jobs.trainer import MemoryTrainer

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
RESULTS = Path(tempfile.gettempdir()) / "memlayer_families.jsonl"
SECONDS, MOST_PARAMETERS = 900, 20_000_000
VOCAB, FIRST_TOKEN = 96, 8
# Sizes under every name that configs give them.
WIDTH = dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32)
INNER = dict.fromkeys(
    ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim",
     "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp", "dim_ff",
     "shared_intermediate_size", "dense_intermediate_size", "expert_ffn_hidden_size"), 48)  # fmt: skip
LAYERS = dict.fromkeys(
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
     "num_decoder_layers", "num_encoder_layers"), 4)  # fmt: skip
HEADS = dict.fromkeys(
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
     "num_decoder_attention_heads", "num_encoder_attention_heads", "linear_num_value_heads", "linear_num_key_heads",
     "mamba_n_heads", "lightning_nope_head"), 4)  # fmt: skip
WIDTHS_OF_HEADS = dict.fromkeys(
    ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank",
     "linear_key_head_dim", "linear_value_head_dim", "rotary_dim", "index_head_dim", "global_head_dim",
     "swa_head_dim", "mamba_d_head", "attention_head_dim"), 8)  # fmt: skip
EXPERTS = dict.fromkeys(
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4
)
OTHERS = {
    "vocab_size": VOCAB, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
    "sliding_window": 16, "rotary_pct": 0.5, "n_shared_experts": 1, "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
    "mamba_d_state": 8, "state_size": 8,
    "ssm_state_size": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "decoder_start_token_id": 3,
}  # fmt: skip
# What the sizes above make impossible in some families: one setting stands for others.
FITTING = {
    "kv_lora_rank": {"num_key_value_heads": 4},  # latent attention: as many as heads
    "mamba_d_head": {"mamba_d_head": 16},  # heads times this is twice the width
    "attention_types": {"attention_types": [[["global", "local"], 2]]},  # one of each for four layers
    "attn_layer_period": {"attn_layer_period": 2, "attn_layer_offset": 1},  # attention within four layers
    "attn_layer_indices": {"attn_layer_indices": [1, 3]},
    "mamba_d_ssm": {"mamba_d_ssm": 64},
    "layer_group_size": {"layer_group_size": 2},
}
SMALL = {**WIDTH, **INNER, **LAYERS, **HEADS, **WIDTHS_OF_HEADS, **EXPERTS, **OTHERS}


def small_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The config of a family with its sizes, and those of the configs inside it, set to small ones."""
    return config_class(**_small(config_class))


def _small(config_class: type[PreTrainedConfig]) -> dict:
    known = set(inspect.signature(config_class.__init__).parameters) | set(vars(config_class()))
    settings = {name: value for name, value in SMALL.items() if name in known}
    for name, fitting in FITTING.items():
        settings |= {key: value for key, value in fitting.items() if name in known and key in known}
    inner = {
        name: each
        for name, each in config_class.sub_configs.items()
        if name in known and getattr(each, "model_type", None) in CONFIG_MAPPING
    }
    return settings | {name: _small(each) for name, each in inner.items()}


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(FIRST_TOKEN, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def seen(model) -> dict[str, torch.Tensor]:
    """All tensors of a model, and its logits.

    Loaded weights lie in a file's pages at any address, and torch's products may round otherwise at another one. So
    every weight is moved to memory of its own first; qwen3_next's logits differ by 5e-7 else, with equal weights.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    state = {name: tensor.clone() for name, tensor in model.eval().state_dict().items()}
    return state | {"logits": model(input_ids=tokens(2, 9)).logits}


def differences(one: dict, other: dict) -> list[str]:
    """Names whose tensors are not the same to the last bit."""
    names = sorted(one.keys() | other.keys())
    return [n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n])]


def try_family(model_type: str, folder: Path) -> dict:
    """What happens to one family; the keys of a row of the table."""
    result = {"family": model_type}
    try:
        config = small_config(CONFIG_MAPPING[model_type])
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            return result | {"not built": f"{size:,} parameters though its known size fields are small"}
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in base.parameters():
            torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.1)
        base.save_pretrained(folder / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        before = seen(base)
        base(**_batch(list(tokens(2, 9)))).loss.backward()
    except Exception as error:
        return result | {"not built": _sentence(error)}
    result |= {"class": type(base).__name__, "experts": any("expert" in name for name in before), "size": size}
    for mode in ("add", "replace"):
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        if wrong := differences(seen(base), before):
            return result | {"not built": f"without memory it does not load as it was saved: {wrong[0]}"}
        result[mode] = _try_mode(base, before, mode, folder / mode)
    return result


def _memory(base, mode):
    torch.manual_seed(0)
    return add_memory(base, MemoryConfig([0, 2], 6, num_heads=2, top_k=2, value_width=12, mode=mode))


def _try_mode(base, before: dict, mode: str, folder: Path) -> str:
    original, original_config = type(base), base.config.to_dict()
    try:
        model = _memory(base, mode)
    except ValueError as error:
        kept = not differences(seen(base), before) and type(base) is original
        return f"refused: {_sentence(error)}" if kept else "FAILED: a refusal changed the model"
    try:
        if mode == "add" and (wrong := differences({"logits": seen(model)["logits"]}, {"logits": before["logits"]})):
            return f"FAILED: attaching changed {wrong[0]}"
        for parameter in memory_parameters(model).values():
            torch.nn.init.normal_(parameter.data)
        model.save_pretrained(folder / "with")
        loaded = AutoModelForCausalLM.from_pretrained(folder / "with")
        if wrong := differences(seen(loaded), seen(model)):
            return f"FAILED: {len(wrong)} tensors are not loaded as they were saved, {wrong[0]} first"
        if (wrong := _resume(folder.parent / "base", mode, folder)) is not None:
            return f"FAILED: {wrong}"
        remove_memory(model)
        if wrong := differences(seen(model), before):
            return f"FAILED: {wrong[0]} is not given back"
        if type(model) is not original or model.config.to_dict() != original_config:
            return "FAILED: class or config is not given back"
    except Exception as error:
        traceback.print_exc()
        return f"FAILED: {_sentence(error)}"
    return "yes"


def _resume(base: Path, mode: str, folder: Path) -> str | None:
    """Train three steps at once, and with an interruption after two; what differs, if something does."""

    def trainer():
        model = _memory(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), mode).requires_grad_(False)
        for parameter in memory_parameters(model).values():
            parameter.requires_grad_(True)
        arguments = TrainingArguments(
            str(folder / "trainer"), use_cpu=True, max_steps=3, save_strategy="steps", save_steps=2, report_to="none",
            disable_tqdm=True, remove_unused_columns=False, per_device_train_batch_size=2, learning_rate=0.05,
            logging_strategy="no", seed=0,
        )  # fmt: skip
        made = MemoryTrainer(model, arguments, train_dataset=list(tokens(8, 9)), data_collator=_batch)
        made.remove_callback(PrinterCallback)
        return made

    start = seen(trainer().model)
    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-2"))
    if not differences(seen(whole.model), start):
        return "training moved nothing"
    wrong = differences(seen(whole.model), seen(resumed.model))
    return f"a resumed run differs in {wrong[0]}" if wrong else None


def _batch(windows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(windows)
    return {"input_ids": ids, "labels": ids.clone()}


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}"[:300].replace("|", "/")


def _child(model_type: str, results: Path) -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, results.open("a", encoding="utf-8") as out:
        out.write(json.dumps(try_family(model_type, Path(folder))) + "\n")


def try_in_process(model_type: str, results: Path, seconds: int = SECONDS) -> None:
    """Append what happens to a family to a file of JSON lines; also where its process dies or takes too long."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(model_type, results))
    process.start()
    process.join(seconds)
    if process.exitcode != 0:
        what = f"took more than {seconds} s" if process.is_alive() else f"its process ended with {process.exitcode}"
        process.kill()
        with results.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"family": model_type, "not built": what}) + "\n")


def read(results: Path) -> dict[str, dict]:
    """What is known of each family; the last line of one counts."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {row["family"]: row for row in map(json.loads, lines)}


def table(rows: dict[str, dict]) -> str:
    """docs/families.md."""
    tried = [row for _, row in sorted(rows.items()) if "not built" not in row]
    accepted = [row for row in tried if "yes" in (row["add"], row["replace"])]
    refused = [row for row in tried if row not in accepted]
    failed = [row["family"] for row in tried if any(row[m].startswith("FAILED") for m in ("add", "replace"))]
    experts = sum(row["experts"] for row in accepted)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    out = [
        "# Decoder families",
        "",
        f"All {len(rows)} causal language models of {versions}, CPU, float32, at commit {commit.strip()}:",
        "`python tools/family_table.py`.",
        "",
        f"{len(tried)} of them build from a small config that is made for all alike. Of these, {len(accepted)} take",
        f"memory, {experts} with experts and {len(accepted) - experts} without; {len(refused)} do not.",
        '"yes" says, each to the last bit: memory beside the blocks changes no logit, a saved model loads with every',
        "tensor and logit,",
        "a training that was interrupted ends as one that was not, and removing the memory gives back class, config,",
        "weights and logits.",
        f"Accepted but not so: {', '.join(failed) or 'none'}.",
        "",
        "## Families that take memory",
        "",
        "| family | class | experts | beside the block (add) | in its place (replace) |",
        "|---|---|---|---|---|",
        *(
            f"| {r['family']} | {r['class']} | {'yes' if r['experts'] else ''} | {r['add']} | {r['replace']} |"
            for r in accepted
        ),
        "",
        "## Families that are refused, and the sentence",
        "",
        "| family | sentence |",
        "|---|---|",
        *(f"| {r['family']} | {r['add'].removeprefix('refused: ')} |" for r in refused),
        "",
        "## Families that this tool cannot build small, and why",
        "",
        "| family | reason |",
        "|---|---|",
        *(f"| {r['family']} | {r['not built']} |" for _, r in sorted(rows.items()) if "not built" in r),
    ]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; all by default, without those tried already")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines, one a family (default: %(default)s)")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    known = read(args.results)
    families = args.families or [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in known]
    for name in families:
        try_in_process(name, args.results)
        row = read(args.results)[name]
        print(name, "|", row.get("not built") or f"add {row['add']} | replace {row['replace']}", flush=True)
    rows = read(args.results)
    if missing := [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in rows]:
        sys.exit(f"no table yet: {len(missing)} families are left, {missing[0]} first")
    TABLE.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

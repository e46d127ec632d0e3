"""Pretraining on text: what it writes, that a killed run ends with the same bits, what it measures, what it refuses."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from byte_level import byte_level_tokenizer
from commands import REPO, config_of, is_written, refusal, run, start, write_config
from families import decoder
from torch.nn import functional as F

from memlayer.data.packing import stack
from memlayer.data.qa import IGNORED
from memlayer.decoders import files
from memlayer.decoders.attach import memory_tables
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.jobs.config import load_config
from memlayer.jobs.learn import learn
from memlayer.jobs.pretrain_text import (
    build_model,
    packing_of,
    pretrain_text,
    sources_of,
    train_on_text,
    validation_windows,
)
from memlayer.slots.counts import COUNTS_FILE, load_counts

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
COUNTED = {"model.memory.0": 64}
TEXT = {
    "job": "pretrain_text",
    "model": {"settings": LLAMA},
    "tokenizer": {"vocab_size": 400, "characters": 20_000},
    "memory": {"layers": [1], "num_keys": 8, "num_heads": 2, "top_k": 2},
    "data": {"num_known": 40},
    "text": {"length": 32, "buffer": 20, "held_out": 0.1, "num_validation": 3, "num_background": 12},
    "pretrain": {"tokens": 32 * 8 * 6, "batch_size": 8, "warmup_steps": 1, "learning_rate": 0.01},
    "trainer": {"disable_tqdm": True, "bf16": False},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two sources: the facts that TEXT names, and a file of texts about numbers."""
    path = tmp_path_factory.mktemp("text") / "numbers.jsonl"
    texts = [" ".join(f"After {n + k} comes {n + k + 1}." for k in range(n % 6 + 1)) for n in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return {"facts": {"facts": True}, "numbers": {"files": [str(path)], "weight": 2}}


def text_run(folder, sources, **changes):
    changes["text"] = {"sources": sources, **changes.get("text", {})}
    return config_of(TEXT, folder, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sources):
    config = text_run(tmp_path_factory.mktemp("trained") / "out", sources)
    return pretrain_text(config), config


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def outcome(folder):
    """Everything that a finished run leaves to later ones, times left out."""
    model, _ = files.load(folder)
    ((table, _),) = memory_tables(model).items()
    counts = load_counts(folder / COUNTS_FILE, {table: 64})[table]
    results = results_of(folder)
    losses = [entry["eval_loss"] for entry in results["log"] if "eval_loss" in entry]
    told = {key: results[key] for key in ("validation_loss", "steps", "tokens", "sources", "parameters")}
    reads = counts.reads_N.tolist(), counts.document_frequency_N.tolist(), counts.num_documents
    return state_fingerprint(model), reads, losses, told


def test_it_writes_a_model_that_can_be_taught_with_its_counts_and_what_it_took(trained, tmp_path):
    folder, config = trained
    model, tokenizer = files.load(folder)
    assert len(tokenizer) == model.config.vocab_size == 400
    counts = load_counts(folder / COUNTS_FILE, COUNTED)["model.memory.0"]
    assert counts.num_documents == 12
    assert "a held-out document of the pretraining text, or a piece of 32 tokens" in counts.document
    results = results_of(folder)
    assert (results["steps"], results["tokens"]) == (6, config.pretrain.tokens)
    of_facts, of_numbers = (results["sources"][name]["tokens"] for name in ("facts", "numbers"))
    assert of_facts + of_numbers == results["tokens"]
    assert of_numbers == pytest.approx(2 * of_facts, rel=0.2)
    assert results["parameters"]["whole model"] == sum(p.numel() for p in model.parameters())
    assert load_config(folder / "config.yaml") == config
    lessons = tmp_path / "lessons.jsonl"
    lessons.write_text('{"question": "Who is Ada?", "answer": "A poet"}\n')
    told = {"job": "learn", "checkpoint": str(folder), "lessons": {"files": [str(lessons)]}}
    told["learn"] = {"steps_per_fact": 1, "num_rows": 4}
    told["trainer"] = {"disable_tqdm": True}
    assert learn(config_of(told, tmp_path / "learned")).patch.num_rows > 0


def test_the_log_says_how_fast_it_goes_and_near_what_ceiling(trained):
    results = results_of(trained[0])
    logged = [entry for entry in results["log"] if "loss" in entry]
    assert [entry["tokens"] for entry in logged] == [32 * 8 * step for step in range(1, 7)]
    for told in [*logged, results["speed"]]:
        assert told["tokens_per_second"] > 0
        assert 0 < told["flop_share"] < 1
        assert 0 <= told["waiting_for_text"] < 1
    assert 0.05 < logged[-1]["peak_memory_gb"] < 50
    speed = results["speed"]
    share = speed["tokens_per_second"] * speed["flops_per_token"] / speed["matmul_flops_per_second"]
    assert speed["flop_share"] == pytest.approx(share)


def windows_of(config, tokenizer):
    return validation_windows(packing_of(config, sources_of(config), tokenizer), config.text.num_validation)


def test_the_validation_loss_is_the_mean_over_all_tokens_asked_of_held_out_windows(trained):
    folder, config = trained
    model, tokenizer = files.load(folder)
    nats, asked = 0.0, 0
    for window in windows_of(config, tokenizer):
        batch = stack([window])
        with torch.no_grad():
            logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        nats += F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], ignore_index=IGNORED, reduction="sum").item()
        asked += int((batch["labels"][0, 1:] != IGNORED).sum())
    assert asked < config.text.num_validation * 31, "first tokens of documents are not asked"
    assert results_of(folder)["validation_loss"] == pytest.approx(nats / asked, rel=1e-5)


def test_the_validation_loss_does_not_depend_on_how_windows_are_batched(trained, tmp_path):
    folder, _ = trained
    one_by_one = [f"output={tmp_path / 'out'}", "trainer.per_device_eval_batch_size=1"]
    again = pretrain_text(load_config(folder / "config.yaml", one_by_one))
    assert results_of(again)["validation_loss"] == pytest.approx(results_of(folder)["validation_loss"], rel=1e-5)
    assert state_fingerprint(files.load(again)[0]) == state_fingerprint(files.load(folder)[0])


def test_micro_batches_take_the_step_of_the_whole_batch(trained, tmp_path):
    folder, _ = trained
    again = pretrain_text(
        load_config(folder / "config.yaml", [f"output={tmp_path / 'out'}", "trainer.gradient_accumulation_steps=4"])
    )
    assert results_of(again)["sources"] == results_of(folder)["sources"], "the same windows"
    assert results_of(again)["validation_loss"] == pytest.approx(results_of(folder)["validation_loss"], rel=1e-4)


LONG = {"pretrain": {"tokens": 32 * 8 * 24}, "trainer": {"save_strategy": "steps", "save_steps": 4}}


# Dropout draws from the generators that a checkpoint keeps; workers have read ahead when the run is killed.
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_step_goes_on_and_ends_with_the_same_bits(tmp_path, sources, workers):
    told = {"dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    changes = {**LONG, "model": {"settings": GPT2}, "text": {"sources": sources}, "trainer": LONG["trainer"] | told}
    whole = write_config(tmp_path / "whole.yaml", TEXT, output=str(tmp_path / "whole"), **changes)
    assert run("train.py", whole).returncode == 0
    path = write_config(tmp_path / "stopped.yaml", TEXT, output=str(tmp_path / "stopped"), **changes)
    first = tmp_path / "stopped" / "trainer" / "checkpoint-4"
    process = start("train.py", path, folder=tmp_path)
    while process.is_alive() and not is_written(first / "trainer_state.json"):
        time.sleep(0.005)
    time.sleep(torch.rand(()).item() * 0.1)
    process.kill()
    process.join()
    assert not (tmp_path / "stopped" / "config.yaml").exists(), "the run ended before it was killed"
    done = run("train.py", path)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path / "stopped")["resumed_at"] >= 4
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_the_text_and_go_on_where_they_were(tmp_path, sources):
    changes = {**LONG, "text": {"sources": sources}, "trainer": {**LONG["trainer"], "dataloader_num_workers": 1}}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    for name in ("whole", "stopped"):
        path = write_config(tmp_path / f"{name}.yaml", TEXT, output=str(tmp_path / name), **changes)
        command = [sys.executable, *launch, str(path)]
        if name == "stopped":
            process = subprocess.Popen(command, cwd=REPO)
            while process.poll() is None and not is_written(
                tmp_path / "stopped/trainer/checkpoint-4/trainer_state.json"
            ):
                time.sleep(0.01)
            everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for each in everyone:  # the launcher gives its processes sessions of their own
                each.kill()
            psutil.wait_procs(everyone)
            process.wait()
            assert not (tmp_path / "stopped" / "config.yaml").exists(), "the run ended before it was killed"
            assert "as many processes and trainer.dataloader_num_workers as" in refusal("train.py", path)
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1
    results = results_of(tmp_path / "stopped")
    assert results["resumed_at"] >= 4
    assert sum(each["tokens"] for each in results["sources"].values()) == results["tokens"]
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_run_stopped_while_it_counts_does_not_train_again_and_ends_the_same(tmp_path, trained, sources, monkeypatch):
    config = text_run(tmp_path / "out", sources)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("memlayer.jobs.pretrain_text.count", stop)
        with pytest.raises(KeyboardInterrupt) as stopped:
            pretrain_text(config)
    assert stopped.value.__notes__ == ["stopped; the same command goes on"]
    written = (tmp_path / "out" / ".unfinished" / "model.safetensors").stat().st_mtime_ns
    pretrain_text(config)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written
    assert outcome(tmp_path / "out") == outcome(trained[0])


def test_any_tokenizer_and_the_config_of_any_folder_do(tmp_path, sources):
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    decoder("gemma3").config.save_pretrained(tmp_path / "gemma3")
    config = text_run(
        tmp_path / "out",
        sources,
        model={"config": str(tmp_path / "gemma3"), "settings": {"num_attention_heads": 1}},
        tokenizer={"name": str(tmp_path / "tokenizer")},
    )
    model, tokenizer = files.load(pretrain_text(config))
    assert model.config.base_model_type == "gemma3_text"
    assert model.config.num_attention_heads == 1
    assert model.config.vocab_size == len(tokenizer) == len(byte_level_tokenizer())


def test_a_model_without_memory_is_trained_on_the_same_batches(tmp_path, trained, sources):
    _, tokenizer = files.load(trained[0])
    config = text_run(tmp_path / "out", sources)
    packing = packing_of(config, sources_of(config), tokenizer)
    dense = decoder("llama", vocab_size=len(tokenizer)).train()
    seen = []
    handle = dense.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].clone()) if module.training else None
    )
    results = train_on_text(config, {}, dense, packing, windows_of(config, tokenizer), "dense")
    handle.remove()
    assert results["sources"] == results_of(trained[0])["sources"]
    again = []
    model = build_model(config, tokenizer)
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: again.append(inputs[0].clone()) if module.training else None
    )
    train_on_text(config, {}, model, packing, windows_of(config, tokenizer))
    assert len(seen) == len(again) == 6
    assert all(torch.equal(one, other) for one, other in zip(seen, again))


def test_a_family_that_lets_documents_hear_each_other_is_refused_and_takes_one_in_a_window(tmp_path, sources):
    state = {"model_type": "falcon_h1", **{k: v for k, v in LLAMA.items() if k != "model_type"}, "mamba_d_ssm": 16}
    state |= {"mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4}
    changes = {"model": {"settings": state}, "pretrain": {"tokens": 32 * 8 * 2}}
    with pytest.raises(
        ValueError, match=r"falcon_h1 does not keep documents of one window apart.*text\.together=false"
    ):
        pretrain_text(text_run(tmp_path / "refused", sources, **changes))
    folder = pretrain_text(text_run(tmp_path / "out", sources, **changes, text={"together": False}))
    assert math.isfinite(results_of(folder)["validation_loss"])


REFUSALS = [
    ("text.sources.mine.weight=1", "text.sources.mine has none of files, dataset and facts: a source is one of them"),
    ("text.sources.facts.files=[a.txt]", "text.sources.facts has both files and facts: a source is one of them"),
    ("text.sources.numbers.loss_on=answer", "text.sources.numbers has loss_on or unseen_wordings, which are of facts"),
    ("text.sources.numbers.files=[absent.txt]", "no text file absent.txt"),
    ("text.held_out=0.6", "text.held_out is 0.6, must be below 0.5: it is held out twice"),
    (
        "text.num_validation=9999",
        "windows of 32 tokens before a source ends, text.num_validation is 9999: raise text.h",
    ),
    ("pretrain.tokens=100", "pretrain.tokens is 100, one step takes 8 windows of 32"),
    (
        "model.settings.hidden_sise=8",
        "model.settings.hidden_sise is no setting of LlamaConfig; did you mean hidden_size",
    ),
    ("memory.layers=[7]", "memory layers [7] asked for, the model has layers 0 to 1"),
    ("tokenizer.vocab_size=99999", "no tokenizer with vocab_size = 99999 from this text: "),
    ("trainer.train_sampling_strategy=random", "trainer.train_sampling_strategy cannot be set in job pretrain_text"),
    ("pretrain.steps=3", "pretrain.steps is not a setting; did you mean pretrain.tokens?"),
]


@pytest.mark.parametrize(("override", "message"), REFUSALS)
def test_what_does_not_fit_is_refused_in_one_sentence_before_anything_is_trained(tmp_path, sources, override, message):
    path = write_config(tmp_path / "text.yaml", TEXT, output=str(tmp_path / "out"), text={"sources": sources})
    with pytest.raises((ValueError, OSError)) as refused:
        pretrain_text(load_config(path, [override]))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_command_refuses_in_one_sentence(tmp_path, sources):
    path = write_config(tmp_path / "text.yaml", TEXT, output=str(tmp_path / "out"), text={"sources": sources})
    assert "memory layers [7] asked for, the model has layers 0 to 1" in refusal("train.py", path, "memory.layers=[7]")


def test_data_without_facts_is_refused(tmp_path, sources):
    with pytest.raises(ValueError, match="settings of data are there, and no source of the text is of facts"):
        text_run(tmp_path / "out", {"numbers": sources["numbers"]})


def test_another_text_is_another_run(tmp_path, trained, sources):
    folder, _ = trained
    other = tmp_path / "numbers.jsonl"
    content = Path(*sources["numbers"]["files"]).read_text(encoding="utf-8")
    other.write_text(content, encoding="utf-8")
    renamed = load_config(folder / "config.yaml", [f"text.sources.numbers.files=[{other}]"])
    assert pretrain_text(renamed) == folder, "the same text under another name"
    other.write_text(content + content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds a finished result of another run \(SHA-256 of source numbers was"):
        pretrain_text(renamed)

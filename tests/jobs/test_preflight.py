"""What cannot be trained, on several devices or at its length, is refused in a sentence before anything is trained."""

import pytest
import torch
from transformers import TrainingArguments

from memlayer.data.qa import Example
from memlayer.jobs.config import load_config
from memlayer.jobs.preflight import check_lengths, training_arguments


def arguments_of(recipe, tmp_path, *overrides):
    config = load_config(f"configs/{recipe}.yaml", [f"output={tmp_path}", *overrides])
    return training_arguments(config, per_device_train_batch_size=6)


def test_one_process_with_several_gpus_is_refused_before_it_doubles_the_batch(monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _arguments: 2))
    with pytest.raises(ValueError, match=r"2 GPUs are visible, .* CUDA_VISIBLE_DEVICES=0"):
        arguments_of("learn_sparse_memory", tmp_path)


def test_a_device_without_kernels_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingArguments, "device", property(lambda _arguments: torch.device("mps")))
    with pytest.raises(ValueError, match=r"the kernels have no way on mps: leave trainer\.use_cpu out"):
        arguments_of("learn_sparse_memory", tmp_path)


def several(monkeypatch, device, processes=2):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _arguments: processes))
    monkeypatch.setattr(TrainingArguments, "device", property(lambda _arguments: device))


def test_tables_and_rows_are_trained_by_several_processes_on_gpus(monkeypatch, tmp_path):
    several(monkeypatch, torch.device("cuda", 0))
    for recipe in ("pretrain", "learn_full", "learn_dense_memory", "learn_sparse_memory", "learn_lora"):
        assert arguments_of(recipe, tmp_path).world_size == 2


def test_what_a_shared_table_cannot_do_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"table\.shards is 2, and 1 process cannot stand in groups of that size"):
        arguments_of("pretrain", tmp_path, "table.shards=2")
    several(monkeypatch, torch.device("cpu"))
    assert arguments_of("pretrain", tmp_path, "table.shards=2")
    for recipe, setting, said in (
        ("learn_lora", "learn.learning_rate=1e-4", r"learn\.method=lora"),
        ("learn_retrieval", "learn.min_share=0.5", r"learn\.method=retrieval"),
        ("learn_sparse_memory", "learn.terms.ngram.n=3", r"learn\.terms\.ngram"),
        ("learn_sparse_memory", "learn.mist.epochs=2", r"learn\.mist"),
        ("learn_sparse_memory", "trainer.save_on_each_node=true", r"trainer\.save_on_each_node"),
    ):
        with pytest.raises(ValueError, match=said):
            arguments_of(recipe, tmp_path, "table.shards=2", setting)


def test_engines_that_split_tables_are_refused(monkeypatch, tmp_path):
    for engine in ("fsdp", "deepspeed"):
        with pytest.raises(ValueError, match=f"{engine}.* would split memory tables"):
            arguments_of("pretrain", tmp_path, f"trainer.{engine}=settings.json")
        with monkeypatch.context() as patched:
            patched.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
            with pytest.raises(ValueError, match=f"{engine}.* would split memory tables"):
                arguments_of("pretrain", tmp_path)


def test_an_example_that_is_too_long_is_named():
    examples = [Example("Who?", "Ada"), Example("Where is Shop Ada?", "Bonn on the Rhine")]
    lengths = [{"length": 6}, {"length": 9}]
    check_lengths(lengths, 9, examples)
    refusal = r"the longest example has 9 tokens, model.max_length is 8: 'Where is Shop Ada\? Bonn on the Rhine'"
    with pytest.raises(ValueError, match=refusal):
        check_lengths(lengths, 8, examples)

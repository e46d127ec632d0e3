"""Steps of several models are timed in turns, on one batch each round, and each step trains."""

import time
from statistics import median

import pytest
import tiny
import torch
from training import examples, trainer_of

from memlayer.data.qa import collate
from memlayer.decoders.attach import add_memory
from memlayer.decoders.controls import as_control
from memlayer.jobs import step_times
from memlayer.jobs.step_times import WARM_UP, step_seconds
from memlayer.layers.config import MemoryConfig

MEMORY = MemoryConfig([1], num_keys=8, num_heads=2, top_k=3)


def trainers(tmp_path):
    models = {"memory": tiny.memory_model(), "dense": add_memory(tiny.decoder(), as_control(MEMORY, "dense"))}
    return {name: trainer_of(model, tmp_path / name, examples()) for name, model in models.items()}


def batches(number):
    plain = ("input_ids", "attention_mask", "labels")
    made = [collate(examples(2, seed=place), tiny.PAD) for place in range(number)]
    return [{name: each[name] for name in plain} for each in made]


def test_models_take_turns_and_the_median_of_each_is_told(tmp_path, monkeypatch):
    turns, step = [], step_times._step

    def noting(trainer, optimizer, batch):
        took = step(trainer, optimizer, batch)
        turns.append((trainer, batch, took))
        return took

    monkeypatch.setattr(step_times, "_step", noting)
    both, given = trainers(tmp_path), batches(3)
    start = time.perf_counter()
    found = step_seconds(both, given)
    passed = time.perf_counter() - start
    rounds = [given[0]] * WARM_UP + given
    assert [(trainer, id(batch)) for trainer, batch, _ in turns] == [
        (trainer, id(batch)) for batch in rounds for trainer in both.values()
    ]
    for name, trainer in both.items():
        assert found[name] == median([took for whose, _, took in turns if whose is trainer][WARM_UP:])
    assert 0 < sum(took for _, _, took in turns) < passed


def test_a_step_is_one_of_training(tmp_path):
    both = trainers(tmp_path)
    before = {name: tiny.snapshot(trainer.model) for name, trainer in both.items()}
    step_seconds(both, batches(1))
    for name, trainer in both.items():
        moved = {
            key for key, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name][key])
        }
        assert moved == before[name].keys()
        assert all(p.grad is None for p in trainer.model.parameters())


def test_no_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no batch to time steps on"):
        step_seconds({}, [])

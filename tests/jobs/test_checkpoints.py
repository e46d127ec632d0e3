"""A run goes on from its newest whole checkpoint, and ends with the same model however it came to its end."""

import logging
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from training import assert_same, batches_read, examples, trainer_of

from memlayer.decoders.files import WEIGHTS
from memlayer.jobs.checkpoints import checkpoint_to_resume, damage_of, newest_checkpoint
from memlayer.jobs.config import PretrainRun
from memlayer.jobs.stepwise_trainer import ORDER

STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
CONFIG = PretrainRun(output="x")


def trained(folder, seed=0, **settings):
    """A trainer that went on from whatever the folder holds, to the end."""
    trainer = trainer_of(tiny.memory_model(seed=seed), folder, examples(), **{**STEPS, **settings})
    trainer.train_from(newest_checkpoint(folder))
    return trainer


def weights(trainer):
    return dict(trainer.model.state_dict())


@pytest.fixture
def run(tmp_path):
    """A run of six steps with three checkpoints."""
    trainer = trainer_of(tiny.memory_model(), tmp_path / "run", examples(), **STEPS)
    assert checkpoint_to_resume(trainer.args, CONFIG, {}) is None
    trainer.train_from(None)
    return trainer


def cut_short(file):
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: cut_short(folder / "optimizer.pt"), "optimizer.pt is damaged"),
        (lambda folder: cut_short(folder / WEIGHTS), "model.safetensors is damaged"),
        (lambda folder: (folder / "trainer_state.json").write_text(""), "trainer_state.json is damaged"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(run, caplog, spoil, said):
    folder = run.args.output_dir
    newest = newest_checkpoint(folder)
    assert (newest.name, damage_of(newest)) == ("checkpoint-6", None)
    spoil(newest)
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume(run.args, CONFIG, {}).name == "checkpoint-4"
    assert f"checkpoint-6 is passed over: {said}" in caplog.text
    assert_same(weights(trained(folder, seed=1)), weights(run))


EPOCHS = {"max_steps": 25, "save_steps": 1, "train_sampling_strategy": "group_by_length"}  # of ten steps each


@pytest.fixture(scope="module")
def run_of_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("epochs") / "run"
    with batches_read() as batches:
        trainer = trained(folder, **EPOCHS)
    orders = [torch.cat([batch.flatten() for batch in batches[first : first + 10]]) for first in (0, 10)]
    assert not torch.equal(*orders), "each epoch has an order of its own"
    return trainer


@pytest.mark.parametrize("step", [4, 10, 11, 14, 20, 23])
def test_a_run_goes_on_in_the_order_of_its_epoch_wherever_it_was_stopped(tmp_path, run_of_epochs, step):
    shutil.copytree(Path(run_of_epochs.args.output_dir) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert_same(weights(trained(tmp_path, seed=1, **EPOCHS)), weights(run_of_epochs))
    shutil.copytree(tmp_path / "checkpoint-24", tmp_path / "again" / "checkpoint-24")
    assert_same(weights(trained(tmp_path / "again", seed=1, **EPOCHS)), weights(run_of_epochs))


def test_a_checkpoint_that_does_not_tell_the_order_of_its_epoch_is_refused(tmp_path, run_of_epochs):
    shutil.copytree(Path(run_of_epochs.args.output_dir) / "checkpoint-14", tmp_path / "checkpoint-14")
    (tmp_path / "checkpoint-14" / ORDER).unlink()
    with pytest.raises(ValueError, match=r"order_state\.pth is missing, an older version wrote this checkpoint"):
        trained(tmp_path, **EPOCHS)


def test_a_run_with_nothing_left_to_do_takes_its_last_model_in_one_file_or_in_shards(run):
    folder = newest_checkpoint(run.args.output_dir)
    assert_same(weights(trained(run.args.output_dir, seed=1)), weights(run))
    (folder / WEIGHTS).unlink()
    run.model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert_same(weights(trained(run.args.output_dir, seed=1)), weights(run))


def test_a_checkpoint_of_another_model_is_refused_rather_than_loaded_in_part(run):
    trainer = trainer_of(tiny.memory_model(layers=[0, 2], share=False), run.args.output_dir, examples(), **STEPS)
    with pytest.raises(ValueError, match="do not fit its config: 16 missing"):
        trainer.train_from(newest_checkpoint(run.args.output_dir))


def test_the_best_model_is_the_end_of_the_first_run_and_of_any_other(tmp_path):
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.03}

    def ended(folder, seed=0):
        model, validation = tiny.memory_model(seed=seed), examples(4, seed=1)
        trainer = trainer_of(model, folder, examples(), validation=validation, **{**STEPS, **settings})
        trainer.train_from(newest_checkpoint(folder))
        return trainer

    whole = ended(tmp_path / "run")
    assert 0 < whole.state.best_global_step < 6, "the rate is so high that a later step is worse"
    assert_same(weights(ended(tmp_path / "run", seed=1)), weights(whole))
    (tmp_path / "run").rename(tmp_path / "renamed")
    shutil.rmtree(tmp_path / "renamed" / "checkpoint-6")
    assert_same(weights(ended(tmp_path / "renamed", seed=1)), weights(whole))
    shutil.rmtree(tmp_path / "renamed" / f"checkpoint-{whole.state.best_global_step}")
    with pytest.raises(ValueError, match="held the best model so far, and it is gone"):
        ended(tmp_path / "renamed")


def test_checkpoints_that_no_run_wrote_are_refused(tmp_path):
    trainer = trainer_of(tiny.memory_model(), tmp_path, examples(), **STEPS)
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(ValueError, match="holds checkpoints that no run of memlayer wrote: name another output"):
        checkpoint_to_resume(trainer.args, CONFIG, {})


def test_a_loss_that_is_no_number_stops_the_training_at_its_step(tmp_path):
    model = tiny.memory_model()
    trainer = trainer_of(model, tmp_path, examples(), max_steps=6, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"^the loss is (nan|inf) at step [23]$"):
        trainer.train_from(None)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"^the loss is nan at step 1$"):
        trainer_of(model, tmp_path, examples(), max_steps=6).train_from(None)

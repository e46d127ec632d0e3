"""What a learning run writes is what it learned, and it writes over nothing."""

import math

import pytest
import torch
from commands import checkpoint, learned_by
from training import batches_read

from memlayer.data.qa import encode
from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.jobs.lessons import lessons_of
from memlayer.jobs.taught import load_learned, read_taught, save_learned
from memlayer.methods import METHODS, STORES

__all__ = ["checkpoint"]  # a fixture
TABLE = "model.memory.0"
RATES = {"sparse_memory": 1.0, "dense_memory": 0.01, "full": 0.01, "lora": 0.01, "sparse_mask": 0.01, "ridge": 1.0}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_is_loaded_is_what_was_learned_to_the_bit(tmp_path, checkpoint, method):
    learned = learned_by(checkpoint, tmp_path / "run", method=method, learning_rate=RATES[method])
    save_learned(learned, tmp_path / "run")
    model, _ = load_learned(checkpoint, tmp_path / "run")
    base, _ = files.load(checkpoint)
    assert state_fingerprint(model) == state_fingerprint(learned.model) != state_fingerprint(base)
    assert all(p.requires_grad for p in learned.model.parameters())
    assert not learned.model.training


@pytest.mark.parametrize("method", sorted(STORES))
def test_a_method_that_keeps_lessons_changes_no_number_takes_no_step_and_writes_its_store(tmp_path, checkpoint, method):
    base, _ = files.load(checkpoint)
    with batches_read() as batches:
        learned = learned_by(checkpoint, tmp_path / "run", method=method)
    assert (len(batches) > 0) == (method != "retrieval"), "what is read to be kept"
    assert (learned.steps, learned.parameters_changed, learned.patch) == (0, 0, None)
    assert state_fingerprint(learned.model) == state_fingerprint(base)
    save_learned(learned, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    model, _ = load_learned(checkpoint, tmp_path / "run")
    assert state_fingerprint(model) == state_fingerprint(base)
    question = lessons_of(learned.config)[0].ask[0]
    kept = read_taught(tmp_path / "run").store
    assert kept.ask(question, lambda asked: True) == learned.store.ask(question, lambda asked: True)
    ids = torch.tensor([encode(learned.tokenizer, lessons_of(learned.config)[0].teach)[0]["input_ids"]])
    with torch.no_grad():
        of_base, of_learned, of_loaded = (each(input_ids=ids).logits for each in (base, learned.model, model))
        with read_taught(tmp_path / "run").model(base, learned.tokenizer) as (attached, _):
            of_attached = attached(input_ids=ids).logits
        assert torch.equal(base(input_ids=ids).logits, of_base), "taken off again"
    assert torch.equal(of_loaded, of_learned)
    assert torch.equal(of_attached, of_learned)
    assert torch.equal(of_learned, of_base) == (method == "retrieval")
    with pytest.raises(ValueError, match="holds this result already"):
        save_learned(learned, tmp_path / "run")


def test_low_rank_updates_may_stay_beside_the_model_and_come_off_again(tmp_path, checkpoint):
    learned = learned_by(checkpoint, tmp_path / "run", method="lora", learning_rate=0.01, merge=False)
    save_learned(learned, tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "run" / "model").exists()
    assert learned.parameters_changed == learned.may_change > 0
    ids = torch.tensor([learned.tokenizer.encode("Where is")])
    base, tokenizer = files.load(checkpoint)
    before, fingerprint = base(ids).logits, state_fingerprint(base)
    loaded, _ = load_learned(checkpoint, tmp_path / "run")
    assert torch.equal(loaded(ids).logits, learned.model(ids).logits)
    with read_taught(tmp_path / "run").model(base, tokenizer) as (model, _):
        assert torch.equal(model(ids).logits, loaded(ids).logits)
        assert not torch.equal(model(ids).logits, before)
    assert state_fingerprint(base) == fingerprint
    assert all(p.requires_grad for p in base.parameters())


def test_a_result_is_never_written_over(tmp_path, checkpoint):
    """Neither that of another method, before it is taught, nor that of the same run."""
    full, sparse = ({"method": method, "learning_rate": RATES[method]} for method in ("full", "sparse_memory"))
    learned = learned_by(checkpoint, tmp_path / "run", **full)
    save_learned(learned, tmp_path / "run")
    written = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=r"a finished result of another run \(learn.learning_rate was 0.01, is 1.0"):
        learned_by(checkpoint, tmp_path / "run", **sparse)
    with pytest.raises(ValueError, match="holds this result already"):
        save_learned(learned, tmp_path / "run")
    assert contents(tmp_path / "run") == written


def contents(folder):
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "theirs",
    ["model/my_thesis.tex", "patch/fix.diff", "config.yaml", "learned.json", "trainer/checkpoint-7/trainer_state.json"],
)
def test_files_that_no_run_wrote_are_refused_before_training_and_left_alone(tmp_path, checkpoint, theirs):
    file = tmp_path / "home" / theirs
    file.parent.mkdir(parents=True)
    file.write_text("three years: of work")
    learned = learned_by(checkpoint, tmp_path / "elsewhere")
    with batches_read() as batches, pytest.raises(ValueError, match=r"name another output"):
        learned_by(checkpoint, tmp_path / "home", trainer={"save_strategy": "steps", "save_steps": 2})
    assert not batches
    if not theirs.startswith("trainer"):
        with pytest.raises(ValueError, match=r"name another output"):
            save_learned(learned, tmp_path / "home")
    assert contents(tmp_path / "home") == {theirs: b"three years: of work"}


def test_a_patch_of_numbers_that_are_not_finite_is_not_written(tmp_path, checkpoint):
    learned = learned_by(checkpoint, tmp_path / "run")
    learned.patch.tables[TABLE].rows[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1 of \d+ numbers of the patch of model.memory.0 are nan or infinite"):
        save_learned(learned, tmp_path / "run")
    assert contents(tmp_path / "run") == {}

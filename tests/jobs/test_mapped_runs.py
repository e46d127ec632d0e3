"""Jobs on a mapped table: the same rows, patch and scores as on a loaded one, and a checkpoint that stays as it is."""

import shutil
from dataclasses import asdict

import pytest
from commands import LEARN, checkpoint, config_of
from safetensors.torch import load_file

from memlayer.decoders import files
from memlayer.decoders.fingerprint import fingerprint, state_fingerprint
from memlayer.decoders.looked_at import KEPT_FILE
from memlayer.decoders.mapped import mapped_tables
from memlayer.jobs.evaluate import Evaluation, evaluate
from memlayer.jobs.learn import inputs_of, learn, learn_into_output
from memlayer.jobs.taught import load_learned, save_learned

__all__ = ["checkpoint"]  # a fixture


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory):
    """The same facts taught to a copy of the checkpoint, loaded and mapped; the copy, and what each learned."""
    folder = tmp_path_factory.mktemp("runs")
    base = shutil.copytree(checkpoint, folder / "base")
    learned = {}
    for table in ("loaded", "mapped"):
        learned[table] = learn(config_of(LEARN, folder / table, checkpoint=str(base), table={"place": table}))
        save_learned(learned[table], folder / table)
    return base, learned


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != KEPT_FILE}


def test_a_run_on_a_mapped_table_learns_the_same_patch_and_leaves_the_checkpoint(checkpoint, runs):
    base, learned = runs
    ours, theirs = learned["mapped"], learned["loaded"]
    assert mapped_tables(ours.model)
    assert not mapped_tables(theirs.model)
    assert ours.patch.num_rows > 0
    assert ours.patch.fingerprint == theirs.patch.fingerprint
    assert {name: asdict(t)["lessons"].keys() for name, t in ours.patch.tables.items()} == {
        name: asdict(t)["lessons"].keys() for name, t in theirs.patch.tables.items()
    }
    assert ours.sha256 == theirs.sha256
    (weights,) = files.weight_files(base)
    assert inputs_of(ours.config)["checkpoint"] == fingerprint(load_file(weights))
    assert ours.parameters_changed == theirs.parameters_changed > 0
    assert ours.capacity == theirs.capacity
    assert state_fingerprint(ours.model) == state_fingerprint(theirs.model)
    assert bytes_of(base) == bytes_of(checkpoint)


@pytest.mark.parametrize("table", ["loaded", "mapped"])
def test_both_runs_are_asked_on_any_table_and_score_alike(tmp_path, runs, table):
    base, learned = runs
    folders = [base.parent / name for name in learned]
    rows = evaluate(Evaluation(base, folders, num_known=3, output=tmp_path / "report", table=table))
    taught = [{k: v for k, v in row.items() if k.startswith(("learning", "known"))} for row in rows[1:]]
    assert taught[0] == taught[1]
    assert len(taught) == 2


def test_a_run_on_a_mapped_table_is_found_done_on_a_loaded_one(tmp_path, runs):
    base, _ = runs
    for table in ("mapped", "loaded"):
        learn_into_output(config_of(LEARN, tmp_path / "run", checkpoint=str(base), table={"place": table}))
    model, _ = load_learned(base, tmp_path / "run")
    assert state_fingerprint(model) != state_fingerprint(files.load_model(base))


def test_a_run_on_a_mapped_table_goes_on_where_it_was_stopped(tmp_path, runs):
    base, _ = runs
    trainer = {"save_strategy": "steps", "save_steps": 1, "disable_tqdm": True}
    config = config_of(LEARN, tmp_path / "run", checkpoint=str(base), table={"place": "mapped"}, trainer=trainer)
    whole = learn(config)
    shutil.rmtree(tmp_path / "run" / "trainer" / f"checkpoint-{whole.steps}")
    resumed = learn(config)
    assert resumed.resumed_at == whole.steps - 1
    assert resumed.patch.fingerprint == whole.patch.fingerprint


def test_a_store_answers_beside_a_mapped_table(tmp_path, runs):
    base, _ = runs
    learned = learn(
        config_of(LEARN, tmp_path / "run", checkpoint=str(base), table={"place": "mapped"}, learn={"method": "nearest"})
    )
    save_learned(learned, tmp_path / "run")
    assert evaluate(Evaluation(base, [tmp_path / "run"], num_known=0, output=tmp_path / "out", table="mapped"))


def test_lora_beside_a_mapped_table_gives_a_whole_model(tmp_path, runs):
    base, _ = runs
    found = {}
    for table in ("loaded", "mapped"):
        config = config_of(
            LEARN, tmp_path / table, checkpoint=str(base), table={"place": table}, learn={"method": "lora"}
        )
        save_learned(learned := learn(config), tmp_path / table)
        found[table] = state_fingerprint(load_learned(base, tmp_path / table)[0]), learned.parameters_changed
    assert found["mapped"] == found["loaded"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"method": "full"},
            r"learn\.method=full trains whole tables: table 'model\.memory\.0\.weight' is mapped from",
        ),
        ({"method": "dense_memory"}, r"learn\.method=dense_memory trains whole tables"),
        ({"terms": {"trust_region": {}}}, r"learn\.terms\.trust_region holds two numbers for each of a table"),
    ],
)
def test_what_needs_whole_tables_is_refused_before_anything_is_read(tmp_path, runs, settings, words):
    base, _ = runs
    config = config_of(LEARN, tmp_path / "run", checkpoint=str(base), table={"place": "mapped"}, learn=settings)
    with pytest.raises(ValueError, match=words):
        learn(config)

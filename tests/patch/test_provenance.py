"""The patch of a learning run says what was taught, how, by which code and into which model."""

import hashlib
import json
from dataclasses import asdict

from commands import LEARN, checkpoint, config_of

import memlayer
from memlayer.data.facts import BUILTIN_FACTS, BUILTIN_WORDINGS
from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.evaluation.provenance import commit
from memlayer.jobs.learn import learn
from memlayer.jobs.taught import load_learned, save_learned
from memlayer.patch import MemoryPatch
from memlayer.slots.counts import COUNTS_FILE

__all__ = ["checkpoint"]  # a fixture


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def learned(checkpoint, folder, **changes):
    """The patch that a run writes."""
    config = config_of(LEARN, folder, checkpoint=str(checkpoint), seed=5, **changes)
    save_learned(learn(config), folder)
    return config, MemoryPatch.load(folder / "patch")


def test_a_learning_run_writes_where_its_patch_comes_from(checkpoint, tmp_path):
    config, patch = learned(checkpoint, tmp_path / "out")
    assert patch.provenance == {
        "checkpoint": str(checkpoint),
        "data": asdict(config.data),
        "lessons": asdict(config.lessons),
        "prompts": asdict(config.prompts),
        "learn": asdict(config.learn),
        "seed": 5,
        "sha256": {
            "checkpoint": state_fingerprint(files.load(checkpoint)[0]),
            "facts": sha256(BUILTIN_FACTS),
            "wordings": sha256(BUILTIN_WORDINGS),
            "background_counts": sha256(checkpoint / COUNTS_FILE),
        },
        "memlayer_version": memlayer.__version__,
        "commit": commit(),
    }
    assert json.loads(json.dumps(patch.provenance)) == patch.provenance
    assert f"`{checkpoint}`" in (tmp_path / "out" / "patch" / "README.md").read_text()


def test_facts_and_wordings_of_ones_own_are_told_from_the_builtin_ones(checkpoint, tmp_path):
    facts, wordings = tmp_path / "facts.jsonl", tmp_path / "wordings.json"
    facts.write_bytes(BUILTIN_FACTS.read_bytes() + b"\n")
    wordings.write_bytes(BUILTIN_WORDINGS.read_bytes() + b"\n")
    _, patch = learned(checkpoint, tmp_path / "out", data={"facts": str(facts), "wordings": str(wordings)})
    found = patch.provenance["sha256"]
    assert (found["facts"], found["wordings"]) == (sha256(facts), sha256(wordings))
    assert found["facts"] != sha256(BUILTIN_FACTS)


def test_the_patch_of_a_run_is_what_lies_between_the_checkpoint_and_the_model_that_learned(checkpoint, tmp_path):
    _, patch = learned(checkpoint, tmp_path / "out")
    before, _ = files.load(checkpoint)
    after, _ = load_learned(checkpoint, tmp_path / "out")
    assert state_fingerprint(before) != state_fingerprint(after)
    assert MemoryPatch.between(before, after).fingerprint == patch.fingerprint

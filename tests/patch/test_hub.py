"""A patch goes to the Hub and comes back through huggingface_hub's own code, against a Hub on this machine."""

import json

import pytest
import tiny
from fake_hub import FakeHub

from memlayer.patch import CONFIG_FILE, ROWS_FILE, MemoryPatch

PUSH = """
import tiny
from patch_cases import odd_patch
patch = odd_patch(tiny.memory_model())
print(patch.push_to_hub("someone/new-facts", commit_message="Teach it"), patch.fingerprint)
patch.provenance["seed"] = 4
patch.push_to_hub("someone/new-facts")
"""

PULL = """
import sys, tiny
from patch_cases import odd_patch
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.patch import MemoryPatch
name, revision = sys.argv[1:]
patch = MemoryPatch.from_pretrained(name, revision=revision)
model = tiny.memory_model()
odd_patch(model)  # gives the model the numbers that the patch was made for
before = state_fingerprint(model)
patch.apply(model)
applied = state_fingerprint(model) != before
patch.revert(model)
print(patch.fingerprint, patch.provenance["seed"], applied and state_fingerprint(model) == before)
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A hub to which a process of its own has pushed a patch twice, and what that printed of the first."""
    with FakeHub() as hub:
        url, fingerprint = hub.run_python(tmp_path_factory.mktemp("home"), PUSH).split()
        yield hub, url, fingerprint


def test_a_push_is_one_commit_of_the_three_files(pushed):
    hub, url, _ = pushed
    first, taught, latest = hub.repositories["someone/new-facts"]
    assert (taught.message, first.files) == ("Teach it", {})
    assert url == f"{hub.url}/someone/new-facts/commit/{taught.sha}"
    assert set(latest.files) == set(taught.files) == {CONFIG_FILE, ROWS_FILE, "README.md"}
    assert json.loads(latest.files[CONFIG_FILE])["provenance"] == {"seed": 4}
    assert b"library_name: memlayer" in latest.files["README.md"]


@pytest.mark.parametrize(("commit", "seed"), [(1, "3"), pytest.param(2, "4", marks=pytest.mark.slow)])
def test_a_pushed_patch_is_pulled_by_another_process_to_the_bit(pushed, tmp_path, commit, seed):
    hub, _, fingerprint = pushed
    sha = hub.repositories["someone/new-facts"][commit].sha
    pulled = hub.run_python(tmp_path, PULL, "someone/new-facts", sha if commit == 1 else "main")
    assert pulled.split() == [fingerprint, seed, "True"]
    asked = {path.rsplit("/")[-1] for method, path in hub.requests if method == "GET" and sha in path}
    assert asked == {sha, CONFIG_FILE, ROWS_FILE}, "no file but the patch's is asked for"


def test_a_folder_is_read_without_asking_any_hub(tmp_path):
    model = tiny.memory_model()
    MemoryPatch.between(model, model, {"seed": 5}).save_pretrained(tmp_path)
    assert MemoryPatch.from_pretrained(tmp_path).provenance == {"seed": 5}


def test_what_is_neither_a_folder_nor_a_name_on_the_hub_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Repo id must"):
        MemoryPatch.from_pretrained(tmp_path / "missing")

"""``memlayer solve``: several ridge runs end as one would have, and a lesson that is left out as if never taught."""

import pytest
from commands import checkpoint, learned_by, run

from memlayer.jobs.taught import save_learned
from memlayer.methods.row_equations import RowEquations
from memlayer.patch import MemoryPatch

__all__ = ["checkpoint"]  # a fixture
COMMAND = "memlayer_command.py", "solve"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, checkpoint):
    """Folders of ridge runs: of the first two new facts, of the next one, of all three."""
    parts = {"first": (0, 2), "next": (2, 1), "all": (0, 3)}
    folder = tmp_path_factory.mktemp("ridge")
    for name, (first, number) in parts.items():
        told = {"method": "ridge", "positions": "all", "num_rows": 4, "learning_rate": 0.1}
        data = {"first_new": first, "num_new": number}
        save_learned(learned_by(checkpoint, folder / name, data, **told), folder / name)
    return folder


def refusal(*arguments):
    """The one sentence with which the command refuses its input."""
    done = run(*COMMAND, *arguments)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    return line.removeprefix("memlayer solve: ")


def test_two_runs_together_are_the_run_that_taught_both_to_the_bit(tmp_path, checkpoint, runs):
    done = run(*COMMAND, checkpoint, runs / "next", runs / "first", tmp_path / "both")
    assert done.returncode == 0, done.stderr
    whole, both = (MemoryPatch.load(folder / "patch") for folder in (runs / "all", tmp_path / "both"))
    assert both.fingerprint == whole.fingerprint
    assert f"3 lessons in {both.num_rows} rows" in done.stdout
    assert RowEquations.load(tmp_path / "both").lessons.keys() == RowEquations.load(runs / "all").lessons.keys()


def test_without_a_lesson_the_patch_is_that_of_the_others_to_the_bit(tmp_path, checkpoint, runs):
    (last,) = RowEquations.load(runs / "next").lessons
    done = run(*COMMAND, checkpoint, runs / "all", tmp_path / "fewer", "--without", last)
    assert done.returncode == 0, done.stderr
    fewer, first = (MemoryPatch.load(folder / "patch") for folder in (tmp_path / "fewer", runs / "first"))
    assert fewer.fingerprint == first.fingerprint


def test_what_cannot_be_solved_is_refused_in_a_sentence_and_nothing_is_written(tmp_path, checkpoint, runs):
    out, (last,) = tmp_path / "out", RowEquations.load(runs / "next").lessons
    told = checkpoint, runs / "all", out
    assert refusal(*told, "--without", "nobody") == "there is no lesson 'nobody' among the 3 of the equations"
    assert refusal(checkpoint, runs / "next", out, "--without", last).startswith("every lesson is left out")
    assert refusal(checkpoint, runs / "all", runs / "next", out).startswith(f"both equations have lesson '{last}'")
    assert refusal(checkpoint, checkpoint, out).startswith(f"no equations.safetensors in {checkpoint}")
    assert not out.exists()
    assert refusal(checkpoint, runs / "all", runs / "first").endswith("exists already: name a new folder")

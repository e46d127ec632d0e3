"""The guides are run from their first command to their last snippet, each in a folder of its own.

Healing takes two minutes and pretraining one, so the guides to these are run by make test-all.
"""

import json
import re
import shlex

import pytest
from commands import REPO, run

from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.jobs.measure import KL
from memlayer.patch import MemoryPatch

GUIDE, LESSONS, TEXT = (REPO / "docs" / f"{name}.md" for name in ("retrofit", "teach_your_model", "pretrain"))
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def steps(text):
    """What to run, in order: the arguments of python for each command and each snippet."""
    found = []
    for language, content in BLOCK.findall(text):
        if language == "python":
            found.append(["-c", content])
            continue
        for line in content.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line)
            assert program == "python", f"{line} is not run here"
            found.append(arguments)
    return found


def walk(guide, folder):
    """Follow a whole guide in a folder; returns where its runs are."""
    (folder / "configs").symlink_to(REPO / "configs")
    for step in steps(guide.read_text()):
        done = run(*step, cwd=folder, timeout=400)
        assert done.returncode == 0, f"{step}\n{done.stderr[-2000:]}"
    return folder / "runs"


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A folder in which the guide to retrofitting was followed."""
    return walk(GUIDE, tmp_path_factory.mktemp("guide"))


@pytest.mark.timeout(1800)
def test_the_guide_to_lessons_teaches_them_and_takes_one_back(tmp_path):
    runs = walk(LESSONS, tmp_path)
    before, after = json.loads((runs / "report_lessons" / "results.json").read_text())["rows"]
    assert before["learning_seen_nll"] > after["learning_seen_nll"] + 1
    measures = [("background_questions", "right"), ("background_questions, F1", "f1")]
    measures += [("background_questions, nats of the answer", "nats"), ("background", "nats"), (KL, "nats")]
    assert [(probe["name"], probe["measure"]) for probe in after["probes"]] == measures
    assert len((runs / "more_wordings" / "lessons.jsonl").read_text().splitlines()) == 3
    patch = MemoryPatch.load(runs / "without_bo")
    assert {lesson for table in patch.tables.values() for lesson in table.lessons} == {"Ada Quill", "Cy Marsh"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_and_snippet_of_the_guide_runs(walked):
    assert len(steps(GUIDE.read_text())) > 10
    results = json.loads((walked / "retrofit_tiny" / "results.json").read_text())
    assert results["healed"]
    assert MemoryPatch.load(walked / "merged").num_rows > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_the_guide_says_of_patches_is_so(walked):
    before, taught, after = (
        state_fingerprint(files.load(walked / name)[0]) for name in ("retrofit_tiny", "taught", "as_before")
    )
    assert before == after != taught


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_base_recalls_taught_wordings(walked):
    control, healing, learned = json.loads((walked / "report_tiny" / "results.json").read_text())["rows"]
    assert control["learning_seen"] == 0
    assert healing["method"] == "attach and heal"
    assert learned["learning_seen"] >= 0.4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_guide_to_pretraining_on_text_trains_two_architectures_and_teaches_one(tmp_path):
    runs = walk(TEXT, tmp_path)
    results = json.loads((runs / "manual" / "results.json").read_text())
    losses = [entry["eval_loss"] for entry in results["log"] if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 1
    read = {name: source["tokens"] for name, source in results["sources"].items()}
    assert read["manual"] == pytest.approx(4 * read["facts"], rel=0.2)
    assert files.load(runs / "gpt2")[0].config.base_model_type == "gpt2"
    earned = json.loads((runs / "earned" / "results.json").read_text())["rows"]
    assert [row["model"] for row in earned] == ["memory", "dense", "dense_time", "one_slot", "shuffled"]
    assert MemoryPatch.load(runs / "taught_manual" / "patch").num_rows > 0

"""Memory and its controls: pretrained on the same batches, asked the same facts, reported side by side."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from commands import config_of, write_config
from training import batches_read

from memlayer.data.stated import with_choices
from memlayer.decoders import files
from memlayer.decoders.attach import memory_tables
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.evaluation.earned import MEMORY, NUMBERS
from memlayer.evaluation.stated import choose_answers
from memlayer.jobs import compare_pretraining as job
from memlayer.jobs import pretrained
from memlayer.jobs.compare_pretraining import DENSE, DENSE_TIME, TIMING, compare_pretraining

NAMES = ("dense", "dense_time", "one_slot", "shuffled")
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
STEP, STEPS = 8 * 32, 6
PRETRAINING = {
    "job": "pretrain_text",
    "model": {"settings": LLAMA},
    "tokenizer": {"vocab_size": 400, "characters": 20_000},
    "memory": {"layers": [1], "num_keys": 8, "num_heads": 2, "top_k": 2},
    "text": {
        "length": 32,
        "buffer": 20,
        "held_out": 0.1,
        "num_validation": 1,
        "num_background": 12,
    },
    "pretrain": {"tokens": STEP * STEPS, "batch_size": 8, "warmup_steps": 1, "learning_rate": 0.01},
    "trainer": {"disable_tqdm": True, "bf16": False, "save_strategy": "steps", "save_steps": 3},
}


def comparison(folder, **changes):
    """Of a text that tells of 80 towns in which of 6 lands each lies, a document each, and that is asked about them."""
    ends = ("ola", "ire", "um", "ex", "and", "ost", "ur", "ick")
    towns = {f"{begin}{end}": f"Land{n % 6}" for n, begin in enumerate("ABCDEFGHIJ") for end in ends}
    texts, questions = folder / "towns.jsonl", folder / "questions.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{t} is a town in {land}."}) + "\n" for t, land in towns.items()))
    records = ({"question": f"Where is {t}?", "answer": land, "subject": t} for t, land in towns.items())
    questions.write_text("".join(json.dumps(each) + "\n" for each in records))
    sources = {"sources": {"towns": {"files": [str(texts)]}}}
    told = write_config(folder / "pretraining.yaml", PRETRAINING, output="elsewhere", text=sources)
    whole = {
        "job": "compare_pretraining",
        "controls": {"config": str(told), "timed_steps": 2},
        "stated": {"questions": [str(questions)], "num_wrong": 3},
    }
    return config_of(whole, folder / "out", **changes)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A finished comparison, and the batches that each forward pass of it embedded while training."""
    folder = tmp_path_factory.mktemp("compared")
    config = comparison(folder)
    read = {}

    def noting(run):
        with batches_read() as batches:
            folder = trained(run)
        read.setdefault(folder.name, batches)
        return folder

    trained, pretrained.pretrain_text = pretrained.pretrain_text, noting
    try:
        compare_pretraining(config)
    finally:
        pretrained.pretrain_text = trained
    return config, folder / "out", read


def results(out):
    return json.loads((out / "results.json").read_text())


def rows(out):
    return {row["model"]: row for row in results(out)["rows"]}


def test_every_model_is_measured_and_told_of(compared):
    _, out, _ = compared
    found = rows(out)
    assert list(found) == [MEMORY, *NAMES]
    for row in found.values():
        assert row.keys() >= {*NUMBERS, "curve", "stated_curve", "stated_n", "seed"}
        assert row["seconds"] > 0
        assert row["stated_n"] >= 4
    report = (out / "report.md").read_text()
    assert all(f"| {name} |" in report and f"- {name}: " in report for name in found)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (out / "stated.jsonl").read_text().splitlines()]
    assert len(samples) == found[MEMORY]["stated_n"]
    assert samples[0]["nats"].keys() == found.keys()


def test_the_models_read_the_same_batches_and_begin_as_the_same_decoder(compared):
    _, _, read = compared
    batches = {name: [b for b in each if b.shape == (8, 32)] for name, each in read.items()}
    for name in ("dense", "one_slot", "shuffled"):
        assert len(batches[name]) >= STEPS
        assert len(batches[name]) == len(batches[MEMORY])
        assert all(map(torch.equal, batches[name], batches[MEMORY]))
    assert all(map(torch.equal, batches[DENSE_TIME][:2], batches[DENSE][:2]))


def test_controls_differ_from_memory_in_what_they_are_for(compared):
    _, out, _ = compared
    found = rows(out)
    assert found["shuffled"]["parameters"] == found[MEMORY]["parameters"]
    assert found["shuffled"]["flops_per_token"] == found[MEMORY]["flops_per_token"]
    assert found[MEMORY]["table_parameters"] == 64 * 16
    assert found["one_slot"]["table_parameters"] == 16
    assert (found["one_slot"]["live_slots"], found["one_slot"]["top_1_percent_share"]) == (1, 1)
    assert found[DENSE]["table_parameters"] == 0
    assert found[DENSE]["live_slots"] is None
    assert 1 <= found[MEMORY]["live_slots"] <= 64


def test_equal_time_is_as_many_batches_as_the_measured_steps_say(compared):
    _, out, _ = compared
    seconds = json.loads((out / "models/seed0" / TIMING).read_text())
    steps = max(1, round(STEPS * seconds[MEMORY] / seconds[DENSE]))
    assert rows(out)[DENSE_TIME]["tokens"] == steps * STEP
    assert results(out)["step_seconds"] == [{"seed": 0, **seconds}]


def test_the_numbers_are_those_of_the_models_that_were_written(compared):
    config, out, _ = compared
    memory = replace(job._base(config), output=str(out / "models/seed0" / MEMORY))
    told = json.loads((out / "models/seed0" / MEMORY / "results.json").read_text())
    facts = job._facts(config, memory, told)
    assert with_choices(facts, 3) == facts
    for name, row in rows(out).items():
        model, tokenizer = files.load(out / "models/seed0" / name)
        chosen = choose_answers(model, tokenizer, facts)
        assert row["stated_right"] == pytest.approx(sum(each.right for each in chosen) / len(chosen))
        assert row["curve"][-1] == [row["tokens"], row["validation_nats"]]
        assert [point[0] for point in row["stated_curve"]][-1] == row["tokens"]
    assert [point[0] for point in rows(out)[MEMORY]["stated_curve"]] == [3 * STEP, 6 * STEP]


def test_memory_is_set_against_each_control_on_the_same_facts(compared):
    _, out, _ = compared
    found, against = rows(out), results(out)["against"]
    assert list(against) == list(NAMES)
    for name, (right, nats) in against.items():
        assert right["before"] == pytest.approx(found[name]["stated_right"])
        assert right["after"] == pytest.approx(found[MEMORY]["stated_right"])
        assert nats["change"] == pytest.approx(found[MEMORY]["stated_nats"] - found[name]["stated_nats"])


def test_a_comparison_that_was_stopped_trains_what_is_missing_and_ends_the_same(tmp_path, compared):
    config, out, _ = compared
    ours = tmp_path / "out"
    shutil.copytree(out, ours)
    for name in ("config.yaml", "results.json", "report.md", "curves.png", "stated.jsonl"):
        (ours / name).unlink()
    shutil.rmtree(ours / "models/seed0/shuffled")
    kept = (ours / "models/seed0/memory/model.safetensors").stat().st_mtime_ns
    tokenizer = str(ours / "models/seed0/memory")
    compare_pretraining(replace(config, output=str(ours)))
    assert (ours / "models/seed0/memory/model.safetensors").stat().st_mtime_ns == kept
    assert tokenizer in (ours / "models/seed0/shuffled/config.yaml").read_text()
    for name in (MEMORY, *NAMES):
        one, other = (state_fingerprint(files.load_model(each / "models/seed0" / name)) for each in (out, ours))
        assert one == other
    timed = {"seconds"}
    ours_rows, theirs = rows(ours), rows(out)
    for name, row in ours_rows.items():
        assert {k: v for k, v in row.items() if k not in timed} == {
            k: v for k, v in theirs[name].items() if k not in timed
        }


def test_a_finished_comparison_is_left_alone_and_another_is_refused(compared):
    config, out, _ = compared
    before = (out / "results.json").stat().st_mtime_ns
    compare_pretraining(config)
    assert (out / "results.json").stat().st_mtime_ns == before
    more = replace(config, controls=replace(config.controls, settings=["pretrain.learning_rate=0.02"]))
    with pytest.raises(ValueError, match="holds a finished result of another run"):
        compare_pretraining(more)


@pytest.mark.slow
def test_no_questions_leave_the_facts_out_and_no_control_leaves_memory_alone(tmp_path):
    config = comparison(tmp_path, stated={"questions": []}, controls={"names": []})
    compare_pretraining(config)
    (row,) = results(tmp_path / "out")["rows"]
    assert row["model"] == MEMORY
    assert row["stated_right"] is None
    report = (tmp_path / "out/report.md").read_text()
    assert "stated facts right" not in report
    assert not math.isnan(row["validation_nats"])
    assert list(memory_tables(files.load_model(tmp_path / "out/models/seed0/memory"))) == ["model.memory.0"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"controls": {"config": "nowhere.yaml"}}, "controls.config is nowhere.yaml: no config at nowhere.yaml"),
        ({"controls": {"names": ["wide"]}}, "controls.names is 'wide', must be 'dense' or 'dense_time'"),
        ({"controls": {"names": ["dense", "dense"]}}, "name each once"),
        ({"controls": {"settings": ["memory.control=dense"]}}, "the memory itself is compared"),
        ({"controls": {"config": "configs/pretrain.yaml"}}, "of job pretrain: name one of job pretrain_text"),
        ({"stated": {"num_wrong": 4000}}, r"too few to choose among 4001 answers"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        compare_pretraining(comparison(tmp_path, **changes))

"""train.py as a user runs it: what it writes, that it goes on where it was stopped, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import LEARN, REPO, TINY, checkpoint, is_written, refusal, run, start, write_config

from memlayer import __version__
from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.jobs.checkpoints import damage_of, newest_checkpoint
from memlayer.jobs.config import ANY_RUN, load_config
from memlayer.jobs.preflight import training_arguments
from memlayer.jobs.taught import load_learned
from memlayer.jobs.typed import names
from memlayer.methods import METHODS
from memlayer.slots.counts import COUNTS_FILE, load_counts, save_counts

__all__ = ["checkpoint"]  # a fixture
COUNTED = {"model.memory.0": 64}


def outcome(folder):
    """Everything that a finished pretraining leaves to later runs: weights, tokenizer and counts."""
    counts = load_counts(folder / COUNTS_FILE, COUNTED)["model.memory.0"]
    tokenizer = (folder / "tokenizer.model").read_bytes()
    reads = counts.reads_N.tolist(), counts.document_frequency_N.tolist(), counts.num_documents
    return state_fingerprint(files.load(folder)[0]), tokenizer, *reads


def result_files(folder):
    """Content of the files of a finished run, those of the Trainer left out."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def result_paths(folder):
    """Whatever is in the folder of a finished run beside the Trainer's checkpoints."""
    return [path for path in folder.iterdir() if path.name != "trainer"]


def test_help_lists_every_setting_and_the_version_is_said():
    done = run("train.py", "--help")
    assert done.returncode == 0
    for name in names(ANY_RUN):
        assert name.removeprefix("trainer.") in done.stdout
    assert "learn.num_rows = 400 " in done.stdout
    assert "    python train.py configs/pretrain.yaml" in done.stdout
    assert run("train.py", "--version").stdout == f"memlayer {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no CONFIG is named; try train.py configs/pretrain.yaml"),
        (["--learning_rate", "3", "configs/learn_full.yaml"], "without dashes: pretrain.learning_rate=3"),
        (["configs/learn_full.yaml", "--learning-rate=3"], "or learn.learning_rate=3"),
        (["configs/learn_full.yaml", "--colour"], "there is no option --colour; settings are written without dashes"),
    ],
)
def test_a_wrong_command_line_says_what_to_write(arguments, message):
    done = run("train.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_options_and_overrides_come_in_any_order(tmp_path):
    path = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "out"))
    done = run("train.py", path, "seed=3", "--print-config", "output=2026_11_27")
    assert done.returncode == 0, done.stderr
    assert "output: '2026_11_27'\nseed: 3\n" in done.stdout


def test_printed_config_is_read_back_as_it_was_and_nothing_is_trained(tmp_path):
    path = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "out"))
    overrides = ["pretrain.learning_rate=3e-4", "data.facts=mine.jsonl", "trainer.save_steps=7"]
    done = run("train.py", path, *overrides, "--print-config")
    assert done.returncode == 0
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert load_config(tmp_path / "printed.yaml") == load_config(path, overrides)
    assert not (tmp_path / "out").exists()


def test_pretraining_writes_model_tokenizer_counts_and_config(tmp_path):
    path = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "out"))
    done = run("train.py", path, "seed=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"wrote {tmp_path / 'out'}\n")
    config = load_config(tmp_path / "out" / "config.yaml")
    assert config == load_config(path, ["seed=3"])
    model, tokenizer = files.load(tmp_path / "out")
    assert len(tokenizer) == model.config.vocab_size == config.model.vocab_size
    counts = load_counts(tmp_path / "out" / COUNTS_FILE, COUNTED)["model.memory.0"]
    assert counts.num_documents > 1
    assert counts.reads_N.sum() > 0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_learning_writes_what_changed_with_its_config(tmp_path, checkpoint, method):
    before = result_files(checkpoint)
    settings = {"learn": {"method": method}, "output": str(tmp_path / "out"), "checkpoint": str(checkpoint)}
    path = write_config(tmp_path / "learn.yaml", LEARN, **settings)
    done = run("train.py", path, "learn.learning_rate=0.01")
    assert done.returncode == 0, done.stderr
    written = "patch" if method in ("sparse_memory", "ridge") else "model"
    assert [name for name in ("model", "patch") if (tmp_path / "out" / name).exists()] == [written]
    assert load_config(tmp_path / "out" / "config.yaml").learn.method == method
    took = json.loads((tmp_path / "out" / "learned.json").read_text())
    # Parameters and not the state dict: tied weights count once.
    base = dict(files.load(checkpoint)[0].named_parameters())
    learned = dict(load_learned(checkpoint, tmp_path / "out")[0].named_parameters())
    changed = sum(int((learned[name] != base[name]).sum()) for name in base)
    assert took["parameters_changed"] == changed > 0
    assert took["steps"] == 4, "two facts, two steps each"
    assert took["seconds"] > 0
    assert result_files(checkpoint) == before, "a run does not touch the checkpoint that it starts from"


LONG = {"pretrain": {"steps": 120}, "trainer": {"save_strategy": "steps", "save_steps": 10}}


def test_a_killed_run_goes_on_by_itself_and_ends_with_the_same_bits(tmp_path):
    whole = write_config(tmp_path / "whole.yaml", TINY, output=str(tmp_path / "whole"), **LONG)
    assert run("train.py", whole).returncode == 0
    path = write_config(tmp_path / "stopped.yaml", TINY, output=str(tmp_path / "stopped"), **LONG)
    first = tmp_path / "stopped" / "trainer" / "checkpoint-10"
    process = start("train.py", path, folder=tmp_path)
    while process.is_alive() and not is_written(first / "trainer_state.json"):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (tmp_path / "stopped" / "config.yaml").exists(), "the run ended before it was killed"
    (first.parent / "checkpoint-99998").mkdir()  # killed while it wrote its next checkpoint
    (first.parent / "checkpoint-99999").mkdir()
    (first.parent / "checkpoint-99999" / "trainer_state.json").write_text("")  # or the very end of it
    written = (first / "model.safetensors").stat().st_mtime_ns
    done = run("train.py", path)
    assert done.returncode == 0, done.stderr
    assert (first / "model.safetensors").stat().st_mtime_ns == written, "it started again from nothing"
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


SLOWER = [pytest.param(method, marks=pytest.mark.slow) for method in ("full", "lora")]


@pytest.mark.parametrize("method", ["sparse_memory", *SLOWER])
def test_a_killed_learning_run_goes_on_and_ends_with_what_an_uninterrupted_one_writes(tmp_path, checkpoint, method):
    settings = {"learn": {"method": method, "learning_rate": 0.01, "steps_per_fact": 30}}
    if method == "sparse_memory":
        settings["learn"]["protect"] = 2
    settings["trainer"] = {"disable_tqdm": True, "save_strategy": "steps", "save_steps": 6}

    def learned(name):
        model, _ = load_learned(checkpoint, tmp_path / name)
        return state_fingerprint(model)

    paths = {
        name: write_config(
            tmp_path / f"{name}.yaml", LEARN, output=str(tmp_path / name), checkpoint=str(checkpoint), **settings
        )
        for name in ("whole", "stopped")
    }
    assert run("train.py", paths["whole"]).returncode == 0
    first = tmp_path / "stopped" / "trainer" / "checkpoint-6"
    process = start("train.py", paths["stopped"], folder=tmp_path)
    while process.is_alive() and not is_written(first / "trainer_state.json"):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (tmp_path / "stopped" / "learned.json").exists(), "the run ended before it was killed"
    done = run("train.py", paths["stopped"])
    assert done.returncode == 0, done.stderr
    took = json.loads((tmp_path / "stopped" / "learned.json").read_text())
    assert took["steps"] == 60
    assert took["resumed_at"] >= 6
    assert learned("stopped") == learned("whole")
    # Killed after its last step, a run has nothing left to learn.
    for path in result_paths(tmp_path / "stopped"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run("train.py", paths["stopped"]).returncode == 0
    assert json.loads((tmp_path / "stopped" / "learned.json").read_text())["resumed_at"] == 60
    assert learned("stopped") == learned("whole")


def test_a_learning_run_does_not_go_on_over_another_model_or_other_facts(tmp_path, checkpoint):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    settings = {"trainer": {"disable_tqdm": True, "save_strategy": "steps", "save_steps": 2}}
    out = tmp_path / "out"
    path = write_config(tmp_path / "learn.yaml", LEARN, output=str(out), checkpoint=str(base), **settings)
    assert run("train.py", path).returncode == 0
    finished = result_files(out)
    counts = load_counts(base / COUNTS_FILE, COUNTED)
    counts["model.memory.0"].reads_N[0] += 1
    save_counts(counts, base / COUNTS_FILE)
    assert "holds a finished result of another run (SHA-256 of background_counts was" in refusal("train.py", path)
    assert result_files(out) == finished
    for written in result_paths(out):
        shutil.rmtree(written) if written.is_dir() else written.unlink()
    assert "trainer holds checkpoints of another run (SHA-256 of background_counts was" in refusal("train.py", path)


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_finished_run_is_left_alone_by_another_config_and_kept_by_the_same(tmp_path, strategy):
    settings = {"trainer": {"save_strategy": strategy, "save_steps": 2}}
    path = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "out"), **settings)
    assert run("train.py", path).returncode == 0
    finished = written_at(tmp_path / "out")
    message = refusal("train.py", path, "model.vocab_size=350")
    assert "holds a finished result of another run (model.vocab_size was 400, is 350): name another output" in message
    for overrides in ([], ["trainer.logging_steps=7"], [f"output={tmp_path}/./out"]):
        done = run("train.py", path, *overrides)
        assert done.returncode == 0
        assert "out holds this result already" in done.stdout
    (tmp_path / "out").rename(tmp_path / "renamed")
    done = run("train.py", path, f"output={tmp_path / 'renamed'}")
    assert done.stdout == f"{tmp_path / 'renamed'} holds this result already\n"
    assert written_at(tmp_path / "renamed") == finished


def written_at(folder):
    """When each file below a folder was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_run_stopped_while_it_counts_leaves_no_model_without_counts_and_counts_again(tmp_path):
    path = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "out"))
    whole = write_config(tmp_path / "whole.yaml", TINY, output=str(tmp_path / "whole"))
    assert run("train.py", whole).returncode == 0
    stop = "import memlayer.jobs.pretrain, train, sys, os, signal; sys.argv = ['train.py', sys.argv[-1]]; "
    stop += "memlayer.jobs.pretrain._count_facts = lambda *_: os.kill(os.getpid(), signal.SIGKILL); train.main()"
    assert run("-c", stop, path).returncode == -9
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"trainer", ".unfinished", ".lock"}
    assert "of another run (seed was 0, is 1)" in refusal("train.py", path, "seed=1")
    trained = (tmp_path / "out" / ".unfinished" / "model.safetensors").stat().st_mtime_ns
    assert run("train.py", path).returncode == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == trained
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    assert sorted(result_files(tmp_path / "out")) == sorted(result_files(tmp_path / "whole"))
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_a_result_that_was_whole_when_the_run_was_killed_is_moved_to_its_place(tmp_path, checkpoint):
    path = write_config(tmp_path / "learn.yaml", LEARN, output=str(tmp_path / "out"), checkpoint=str(checkpoint))
    stop = "import pathlib, train, sys, os, signal; sys.argv = ['train.py', sys.argv[-1]]; "
    stop += "pathlib.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL); train.main()"
    assert run("-c", stop, path).returncode == -9
    written = (tmp_path / "out" / ".unfinished" / "learned.json").read_bytes()
    done = run("train.py", path)
    assert "holds this result already" in done.stdout, done.stderr
    assert (tmp_path / "out" / "learned.json").read_bytes() == written
    assert sorted(each.name for each in result_paths(tmp_path / "out")) == ["config.yaml", "learned.json", "patch"]


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_says_in_one_line_where_it_goes_on(tmp_path, sent, status):
    path = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "out"), **LONG)
    process = start("train.py", path, folder=tmp_path)
    first = tmp_path / "out" / "trainer" / "checkpoint-10"
    while process.is_alive() and not is_written(first / "trainer_state.json"):
        time.sleep(0.005)
    os.kill(process.pid, sent)
    process.join()
    assert process.exitcode == status
    said = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert re.fullmatch(r"train.py: stopped at step \d+ of 120; the same command goes on from checkpoint-\d+0", said)
    assert newest_checkpoint(first.parent).name == said.rpartition(" ")[2]
    assert not [each for each in (tmp_path / "out").rglob("*") if each.name.startswith(".")]
    assert all(damage_of(each) is None for each in first.parent.glob("checkpoint-*"))


FULL_DISK = """
import resource, sys, train
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # no file may be larger
sys.argv[0] = "train.py"
train.main()
"""


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path, strategy):
    path = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "out"))
    done = run("-c", FULL_DISK, path, f"trainer.save_strategy={strategy}", "trainer.save_steps=2")
    assert done.returncode == 1
    written = "out" if strategy == "no" else "checkpoint-2"
    assert re.search(rf"^train.py: cannot write .*/{written}: [^\n]*$", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(each.name for each in (tmp_path / "out").rglob("*")) == ["config.yaml", "tokenizer.model", "trainer"]


def test_a_rate_that_makes_the_loss_no_number_is_one_sentence_and_nothing_is_written(tmp_path, checkpoint):
    settings = {"output": str(tmp_path / "out"), "checkpoint": str(checkpoint), "learn": {"method": "full"}}
    path = write_config(tmp_path / "learn.yaml", LEARN, **settings)
    done = run("train.py", path, "learn.learning_rate=1e30")
    assert done.returncode == 1
    said = "train.py: the loss is nan at step 2, nothing is written: a learn.learning_rate=1e+30 may be too high"
    assert said in done.stderr.splitlines(), done.stderr
    assert not [each for each in (tmp_path / "out").rglob("*") if each.is_file()]


def test_two_runs_into_one_folder_at_once_are_refused(tmp_path):
    path = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "out"), pretrain={"steps": 10_000})
    process = start("train.py", path, folder=tmp_path)
    while process.is_alive() and not (tmp_path / "out" / "trainer" / "tokenizer.model").exists():
        time.sleep(0.02)
    message = refusal("train.py", path)
    process.kill()
    process.join()
    assert message == f"another run is writing to {tmp_path / 'out'}: wait for its end, or name another output"


def test_a_bare_no_which_yaml_takes_for_false_is_a_strategy(tmp_path):
    (tmp_path / "pretrain.yaml").write_text(f"job: pretrain\noutput: {tmp_path}\ntrainer: {{save_strategy: no}}\n")
    assert training_arguments(load_config(tmp_path / "pretrain.yaml")).save_strategy == "no"


PRETRAIN_REFUSALS = [
    ("colour=red", "colour is not a setting"),
    ("pretrain.step=3", "pretrain.step is not a setting; did you mean pretrain.steps?"),
    ("pretrain.steps=many", "pretrain.steps is 'many', must be a whole number"),
    ("pretrain.steps=0", "pretrain.steps is 0, must be at least 1"),
    ("pretrain.batch_size=0", "pretrain.batch_size is 0, must be at least 1"),
    ("pretrain.learning_rate=-1", "pretrain.learning_rate is -1.0, must be at least 0"),
    ("pretrain.table_learning_rate=-1", "pretrain.table_learning_rate is -1.0, must be at least 0"),
    ("pretrain.loss_on=some", "pretrain.loss_on is 'some', must be 'all' or 'answer'"),
    ("pretrain.warmup_steps=-1", "pretrain.warmup_steps is -1, must be at least 0"),
    ("count.sequences_per_document=0", "count.sequences_per_document is 0, must be at least 1"),
    ("pretrain.steps", "override 'pretrain.steps' is not of the form section.key=value"),
    ("job=dance", "job is 'dance', must be 'pretrain' or 'pretrain_text' or 'compare_pretraining' or 'retrofit' or"),
    ("checkpoint=runs/x", "checkpoint is a setting of learn and compare, not of pretrain"),
    ("base=runs/x", "base is a setting of retrofit and augment, not of pretrain"),
    ("text.length=9", "text is a setting of pretrain_text and retrofit, not of pretrain"),
    ("learn.num_rows=7", "learn is a setting of learn, not of pretrain"),
    ("seed=-1", "seed is -1, must be at least 0"),
    ("trainer.colour=red", "trainer.colour is no setting of transformers.TrainingArguments that is known here"),
    ("trainer.save_strategy=sometimes", "sometimes is not a valid SaveStrategy"),
    ("trainer.output_dir=elsewhere", "trainer.output_dir cannot be set in job pretrain: it follows from output"),
    (
        "trainer.gradient_accumulation_steps=3",
        "a batch of 16 examples cannot be shared by 1 process with trainer.gradient_accumulation_steps=3: "
        "1, 2, 4, 8, 16 micro-batches would do",
    ),
    ("trainer.resume_from_checkpoint=/nowhere", "a run goes on by itself from the newest checkpoint in its output"),
    ("trainer.report_to=wandb", "trainer.report_to is 'wandb', but its package is not installed"),
    ("trainer.report_to=wandbe", "trainer.report_to is 'wandbe', must be none, all or some of"),
    ("trainer.deepspeed=ds.json", "it would split memory tables by rows, which memlayer cannot train"),
    ("memory.top_k=9", "memory.top_k is 9, must be at most memory.num_keys = 8"),
    ("memory.layers=[2]", "memory layers [2] asked for, the model has layers 0 to 1"),
    ("memory.key_width=3", "key_width is 3, must be even"),
    ("memory.value_width=0", "memory.value_width is 0, must be at least 1"),
    ("memory.mode=both", "memory.mode is 'both', must be 'replace' or 'add'"),
    ("model.num_heads=3", "model.width is 16, must be a multiple of twice model.num_heads = 3"),
    ("model.max_length=10", "tokens, model.max_length is 10"),
    ("model.vocab_size=40000", "no tokenizer with vocab_size = 40000 from this text"),
    ("data.num_known=0", "data.num_known is 0: there are no known facts to pretrain on"),
    ("data.num_known=99999", "known facts 0 to 99999 asked for, the file has"),
    ("data.facts=absent.jsonl", "absent.jsonl: the file cannot be read"),
    ("data.wordings=absent.json", "absent.json: the file cannot be read"),
]


@pytest.mark.parametrize(("override", "message"), PRETRAIN_REFUSALS)
def test_pretraining_refuses_in_one_sentence_and_trains_nothing(tmp_path, override, message):
    path = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "out"))
    assert message in refusal("train.py", path, override)
    assert not list(tmp_path.rglob("*.safetensors"))


LEARN_REFUSALS = [
    ("learn.method=magic", "learn.method is 'magic', must be 'sparse_memory' or 'dense_memory' or 'full' or 'lora'"),
    ("learn.method=full", "learn.num_rows is a setting of sparse_memory and ridge, not of full"),
    ("learn.lora_rank=3", "learn.lora_rank is a setting of lora, not of sparse_memory"),
    ("checkpoint=null", "checkpoint is null, must be text"),
    ("checkpoint=absent", "no checkpoint in absent: config.json is missing"),
    ("checkpoint=Qwen/Qwen2.5-0.5B", "is attached to a pretrained model, also of the hub, by job retrofit"),
    ("learn.learning_rate=-1", "learn.learning_rate is -1.0, must be at least 0"),
    ("learn.num_rows=65", "num_rows is 65, must be between 1 and the table's 64 slots"),
    ("learn.num_rows=0", "learn.num_rows is 0, must be at least 1"),
    ("learn.steps_per_fact=0", "learn.steps_per_fact is 0, must be at least 1"),
    ("learn.statements=8", "8 statements per batch asked for, relation P740 has 7 to teach with"),
    ("learn.statements=-1", "learn.statements is -1, must be at least 0"),
    ("learn.questions=5", "5 questions per batch asked for, relation P740 has 4 to teach with"),
    ("learn.idf_power=-1", "learn.idf_power is -1.0, must be at least 0"),
    ("learn.positions=some", "learn.positions is 'some', must be 'all' or 'subject' or 'answer'"),
    ("learn.rate_unit=lessons learn.optimizer=adam", "learn.rate_unit is lessons and learn.optimizer adam, whose"),
    ("learn.subject_tokens=2", "learn.subject_tokens is 2, but learn.positions is all, which counts more than names"),
    ("learn.loss_on=some", "learn.loss_on is 'some', must be 'all' or 'answer'"),
    ("learn.protect=-1", "learn.protect is -1, must be at least 0"),
    ("learn.optimizer=adamw", "learn.optimizer is 'adamw', must be 'sgd' or 'adam'"),
    ("model.width=32", "model is a setting of pretrain and pretrain_text, not of learn"),
    ("retrofit.steps=9", "retrofit is a setting of retrofit, not of learn"),
    ("trainer.learning_rate=1", "trainer.learning_rate cannot be set in job learn: it follows from"),
    ("data.num_new=0", "data.num_new is 0: there are no new facts to teach"),
    ("data.num_new=5000", "new facts 0 to 5000 asked for, the file has"),
    ("data.first_new=-1", "new facts -1 to 1 asked for"),
]


@pytest.mark.parametrize(("override", "message"), LEARN_REFUSALS)
def test_learning_refuses_in_one_sentence_and_teaches_nothing(tmp_path, checkpoint, override, message):
    path = write_config(tmp_path / "learn.yaml", LEARN, output=str(tmp_path / "out"), checkpoint=str(checkpoint))
    assert message in refusal("train.py", path, *override.split())
    assert not list(tmp_path.rglob("learned.json"))


def test_a_package_that_is_not_installed_is_one_sentence(tmp_path):
    path = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "out"))
    said = "trainer.report_to is 'wandb', but its package is not installed"
    assert refusal("train.py", path, "trainer.report_to=wandb") == said


def test_a_missing_config_is_refused(tmp_path):
    assert refusal("train.py", tmp_path / "absent.yaml") == f"no config at {tmp_path / 'absent.yaml'}"


def test_a_checkpoint_without_its_counts_is_refused(tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "base")
    (tmp_path / "base" / COUNTS_FILE).unlink()
    path = write_config(tmp_path / "learn.yaml", LEARN, output=str(tmp_path / "out"), checkpoint=str(tmp_path / "base"))
    assert refusal("train.py", path).startswith(f"no background counts at {tmp_path / 'base' / COUNTS_FILE}")


def test_a_run_refuses_to_overwrite_the_checkpoint_it_starts_from(tmp_path, checkpoint):
    path = write_config(tmp_path / "learn.yaml", LEARN, output=str(checkpoint), checkpoint=str(checkpoint))
    before = result_files(checkpoint)
    assert refusal("train.py", path).startswith(f"output and checkpoint are both {checkpoint}")
    assert result_files(checkpoint) == before


@pytest.mark.parametrize("base", [TINY, LEARN], ids=["pretrain", "learn"])
def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path, checkpoint, base):
    (tmp_path / "file").write_text("in the way")
    path = write_config(tmp_path / "config.yaml", base, output=str(tmp_path / "file"))
    override = [] if base is TINY else [f"checkpoint={checkpoint}"]
    assert refusal("train.py", path, *override).startswith(f"cannot write to output {tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "in the way"


FACT = {"subject": "Łódź", "relation": "P17", "answers": ["Poland"]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([FACT, {"subject": "Oslo", "relation": "P17"}], "facts.jsonl:2: required key 'answers' is missing"),
        ([FACT, "{"], "facts.jsonl:2: not JSON: "),
        ([FACT, FACT], "facts.jsonl:2: fact 'P17|Łódź' is already given on line 1"),
        ([FACT | {"relation": "P0"}], "facts.jsonl:1: relation 'P0' has no wordings"),
        ([FACT, FACT | {"relation": "P131", "split": "known"}], "Łódź"),
        ([FACT | {"answers": ["Po" * 200]}], "tokens, model.max_length is"),
    ],
    ids=["no answers", "no JSON", "twice", "unknown relation", "known subject", "too long"],
)
def test_a_bad_facts_file_is_refused_by_line_and_nothing_is_taught(tmp_path, checkpoint, lines, message):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "facts.jsonl").write_text("\n".join(texts))
    path = write_config(tmp_path / "learn.yaml", LEARN, output=str(tmp_path / "out"), checkpoint=str(checkpoint))
    overrides = [f"data.facts={tmp_path / 'facts.jsonl'}", "data.num_known=null", "data.num_new=null"]
    assert message in refusal("train.py", path, *overrides)
    assert not list(tmp_path.rglob("learned.json"))


def test_accelerate_launches_pretraining(tmp_path):
    path = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "out"))
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--cpu"]
    quiet = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [sys.executable, *launch, *quiet, "train.py", str(path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert load_config(tmp_path / "out" / "config.yaml").job == "pretrain"


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_two_processes_write_once_and_learn_what_one_learns(tmp_path, checkpoint, shards):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    settings = {"learn": {"questions": 2}, "output": str(tmp_path / "two"), "checkpoint": str(checkpoint)}
    pretrain = write_config(tmp_path / "pretrain.yaml", TINY, output=str(tmp_path / "base"))
    learn = write_config(tmp_path / "learn.yaml", LEARN, **settings)
    for path in (pretrain, learn):
        command = [sys.executable, *launch, str(path), f"table.shards={shards}"]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1
    assert load_counts(tmp_path / "base" / COUNTS_FILE, COUNTED)["model.memory.0"].num_documents > 1
    assert run("train.py", pretrain, f"output={tmp_path / 'alone'}").returncode == 0
    assert run("train.py", learn, f"output={tmp_path / 'one'}").returncode == 0
    one, two = (load_learned(checkpoint, tmp_path / name)[0].state_dict() for name in ("one", "two"))
    took = json.loads((tmp_path / "two" / "learned.json").read_text())
    assert took["steps"] == 4
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
    alone, base = (files.load(tmp_path / name)[0].state_dict() for name in ("alone", "base"))
    for name in alone:
        # Adam divides by the gradient's size, so a gradient that is zero but for rounding moves by a whole step.
        assert torch.isclose(alone[name], base[name], atol=1e-5).float().mean() > 0.98, name
    done_already = run("train.py", pretrain, "table.shards=1")
    assert done_already.returncode == 0, "the same run, whatever the number of processes"

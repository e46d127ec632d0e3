"""The retrofit job: memory heals, all else keeps its bits, exit statuses tell the gate, and the controls are fair."""

import json
import math
import shutil
import subprocess
import sys
import time

import pytest
import torch
from commands import REPO, config_of, is_written, refusal, run, start, write_config
from plain_base import LENGTH, TRAIN, VALIDATION, base, text
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from memlayer.data.text import load_documents
from memlayer.decoders import files
from memlayer.decoders.attach import add_memory, memory_parameters
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.evaluation.healing import BASE, DENSE, MEMORY, gate
from memlayer.evaluation.rows import CONTROL
from memlayer.jobs.config import load_config
from memlayer.jobs.learn import learn
from memlayer.jobs.retrofit import load_base, retrofit
from memlayer.slots.counts import COUNTS_FILE, load_counts

BATCH, STEPS = 8, 12
__all__ = ["base"]  # a fixture
COUNTED = {"model.memory.0": 256}
RETROFIT = {
    "job": "retrofit",
    "memory": {"layers": [1], "num_keys": 16, "num_heads": 2, "top_k": 4, "mode": "add"},
    "text": {"builtin_facts": True, "length": LENGTH, "num_train": TRAIN, "num_validation": VALIDATION},
    "retrofit": {"steps": STEPS, "batch_size": BATCH, "warmup_steps": 2},
    "trainer": {"disable_tqdm": True},
}
LEARN = {
    "job": "learn",
    "data": {"num_known": 10, "num_new": 3},
    "learn": {"steps_per_fact": 2, "num_rows": 8, "learning_rate": 1.0},
    "trainer": {"disable_tqdm": True},
}


@pytest.fixture(scope="session", params=["add", "replace"])
def healed(request, base, tmp_path_factory):
    """A finished retrofit in each mode, and the batches that its two trainings saw."""
    folder = tmp_path_factory.mktemp("healed") / request.param
    config = config_of(RETROFIT, folder, base=str(base), memory={"mode": request.param})
    seen = []

    def hook(module, inputs):
        if type(module) is nn.Embedding and module.training:
            seen.append(inputs[0].clone())

    handle = register_module_forward_pre_hook(hook)
    try:
        return folder, retrofit(config), seen
    finally:
        handle.remove()


def plain_loss(model, windows_WL):
    """Mean negative log likelihood of each token but the first of its window, written out."""
    with torch.no_grad():
        logits = model(windows_WL).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), windows_WL[:, 1:].flatten()).item()


def test_losses_are_those_of_the_base_and_of_the_model_written(base, healed):
    folder, retrofitted, _ = healed
    losses = retrofitted.results["losses"]
    _, validation_WL = text(retrofitted.tokenizer)
    before = AutoModelForCausalLM.from_pretrained(base).eval()
    assert losses[BASE]["after"] == pytest.approx(plain_loss(before, validation_WL), abs=1e-5)
    after, _ = files.load(folder)
    assert losses[MEMORY]["after"] == pytest.approx(plain_loss(after, validation_WL), abs=1e-5)
    assert losses[MEMORY]["after"] < losses[MEMORY]["before"]


def test_adding_starts_as_the_base_and_replacing_below_it(healed):
    _, retrofitted, _ = healed
    losses = retrofitted.results["losses"]
    for name in (MEMORY, DENSE):
        if retrofitted.results["mode"] == "add":
            assert losses[name]["before"] == losses[BASE]["before"]
        else:
            assert losses[name]["before"] > losses[BASE]["before"]


def test_add_gives_the_logits_of_the_base_before_anything_is_learned(tmp_path, base):
    config = config_of(RETROFIT, tmp_path / "out", base=str(base))
    model, tokenizer = load_base(config)
    _, validation_WL = text(tokenizer)
    with torch.no_grad():
        before = model(validation_WL).logits
        assert torch.equal(add_memory(model, config.memory)(validation_WL).logits, before)


def test_without_steps_memory_is_attached_counted_and_hears_what_is_written(tmp_path, base):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"Who is {n}?", "answer": "Ada"}) + "\n" for n in range(7)))
    settings = {"steps": 0, "background_lessons": [str(questions)]}
    retrofitted = retrofit(config_of(RETROFIT, tmp_path / "out", base=str(base), retrofit=settings))
    assert retrofitted.healed
    assert retrofitted.results["losses"].keys() == {BASE, MEMORY}
    counts = load_counts(tmp_path / "out" / COUNTS_FILE, COUNTED)["model.memory.0"]
    assert counts.num_documents == TRAIN + 7
    assert "or one of 7 examples of lessons" in counts.document
    model, tokenizer = files.load(tmp_path / "out")
    _, validation_WL = text(tokenizer)
    with torch.no_grad():
        # With the attention that memlayer chooses for this processor: another one rounds otherwise.
        attention = model.config._attn_implementation
        untouched = AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention)(validation_WL).logits
        assert torch.equal(model(validation_WL).logits, untouched)
    learned = learn(config_of(LEARN, tmp_path / "learned", checkpoint=str(tmp_path / "out")))
    with torch.no_grad():
        assert not torch.equal(learned.model(validation_WL).logits, untouched)


def test_background_lessons_count_by_their_content_and_a_bad_file_is_refused_before_anything_is_trained(tmp_path, base):
    first, same, other = (tmp_path / f"{name}.jsonl" for name in ("first", "same", "other"))
    for path, answer in ((first, "Ada"), (same, "Ada"), (other, "Bo")):
        path.write_text(json.dumps({"question": "Who is it?", "answer": answer}) + "\n")

    def config(path):
        settings = {"steps": 0, "background_lessons": [str(path)]}
        return config_of(RETROFIT, tmp_path / "out", base=str(base), retrofit=settings)

    retrofit(config(first))
    retrofit(config(same))
    with pytest.raises(ValueError, match="SHA-256 of background lessons 1 was"):
        retrofit(config(other))
    other.write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"other\.jsonl: not JSON"):
        retrofit(config(other))


@pytest.mark.parametrize("memory", [{"mode": "replace"}, {"start": "output_zero"}])
def test_without_steps_memory_that_has_to_heal_is_refused(tmp_path, base, memory):
    with pytest.raises(ValueError, match=r"retrofit.steps is 0, and memory of mode .* has to heal"):
        config_of(RETROFIT, tmp_path / "out", base=str(base), memory=memory, retrofit={"steps": 0})


def test_all_but_memory_keeps_the_bits_of_the_base(base, healed):
    folder, retrofitted, _ = healed
    kept = "mlp.ffn." if retrofitted.results["mode"] == "add" else None
    after = files.load(folder)[0].state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(base).state_dict().items():
        if "layers.1.mlp." in name:
            if kept is None:
                continue
            name = name.replace("mlp.", kept)
        assert torch.equal(after[name], tensor), name
    assert len(set(retrofitted.results["frozen"].values())) == 1


def test_every_memory_parameter_was_trained(base, healed):
    folder, _, _ = healed
    config = load_config(folder / "config.yaml")
    torch.manual_seed(config.seed)
    start = add_memory(load_base(config)[0], config.memory)
    after = memory_parameters(files.load(folder)[0])
    assert [name for name, p in memory_parameters(start).items() if torch.equal(p, after[name])] == []


def test_memory_and_dense_control_see_the_same_batches(healed):
    _, retrofitted, seen = healed
    assert len(seen) == 2 * STEPS
    assert all(torch.equal(*pair) for pair in zip(seen[:STEPS], seen[STEPS:]))
    assert not torch.equal(seen[0], seen[1])
    train_WL, validation_WL = text(retrofitted.tokenizer)
    trained_on = {tuple(row.tolist()) for batch in seen for row in batch}
    assert trained_on <= {tuple(row.tolist()) for row in train_WL}
    assert not trained_on & {tuple(row.tolist()) for row in validation_WL}


def test_background_is_the_training_windows_a_window_a_document(healed):
    folder, _, _ = healed
    counts = load_counts(folder / COUNTS_FILE, COUNTED)["model.memory.0"]
    assert counts.num_documents == TRAIN
    assert counts.reads_N.sum() == TRAIN * LENGTH * 2 * 4  # two heads, four slots each
    assert counts.document_frequency_N.max() <= TRAIN
    assert f"window of {LENGTH} tokens" in counts.document


def test_the_report_has_every_number(healed):
    folder, retrofitted, _ = healed
    results = json.loads((folder / "results.json").read_text())
    assert results == json.loads(json.dumps(retrofitted.results))
    report = (folder / "report.md").read_text()
    losses, parameters = results["losses"], results["parameters"]
    assert list(losses) == [BASE, MEMORY, DENSE]
    assert losses[BASE]["before"] == losses[BASE]["after"]
    for loss in losses.values():
        assert f"| {loss['before']:.4f} | {loss['after']:.4f} |" in report
    for number in (*parameters.values(), *results["tokens"].values()):
        assert f"| {number:,} |" in report
    model, _ = files.load(folder)
    assert parameters["whole model"] == sum(p.numel() for p in model.parameters())
    assert parameters["memory, all that is trained"] == sum(p.numel() for p in memory_parameters(model).values())
    assert abs(parameters[DENSE] / parameters["memory, touched by a token"] - 1) < 0.02
    assert results["tokens"]["trained on"] == STEPS * BATCH * LENGTH
    assert results["verdict"] in report
    for words in (results["provenance"]["commit"], "machine", "versions", "seeds", results["frozen"]["sha256_after"]):
        assert words in report
    for name in (MEMORY, DENSE):
        curve = results["curves"][name]["validation"]
        assert curve[0] == [0, losses[name]["before"]]
        assert curve[-1] == [STEPS, losses[name]["after"]]
        assert len(curve) == STEPS + 1
        assert len(results["curves"][name]["training"]) == STEPS
        assert results["seconds"][name] > 0
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(folder / "config.yaml").retrofit.steps == STEPS


def test_under_bfloat16_the_base_and_the_model_attached_are_measured_alike(tmp_path, base):
    changes = {"retrofit": {"steps": 2, "dense_control": False}, "trainer": {"bf16": True}}
    losses = retrofit(config_of(RETROFIT, tmp_path / "out", base=str(base), **changes)).results["losses"]
    assert losses[MEMORY]["before"] == losses[BASE]["before"]
    exact = retrofit(config_of(RETROFIT, tmp_path / "exact", base=str(base), retrofit=changes["retrofit"]))
    assert losses[BASE]["before"] != exact.results["losses"][BASE]["before"]
    assert DENSE not in exact.results["losses"]


def test_healed_is_status_0_and_the_folder_can_be_taught_and_asked(tmp_path, base):
    path = write_config(tmp_path / "retrofit.yaml", RETROFIT, base=str(base), output=str(tmp_path / "out"))
    done = run("train.py", path, "retrofit.dense_control=false")
    assert done.returncode == 0, done.stderr
    assert "train.py: healed: validation loss" in done.stderr
    assert done.stdout.endswith(f"wrote {tmp_path / 'out'}\n")
    checkpoint, learned = str(tmp_path / "out"), str(tmp_path / "learned")
    learn = write_config(tmp_path / "learn.yaml", LEARN, checkpoint=checkpoint, output=learned)
    done = run("train.py", learn)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "learned" / "learned.json").read_text())["parameters_changed"] > 0
    done = run("eval.py", checkpoint, learned, "--output", tmp_path / "report", "--num-known", 10)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "report" / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [CONTROL, "attach and heal", "sparse_memory"]
    healing = rows[1]
    assert healing["known_seen_nll_before"] != healing["known_seen_nll_after"] == rows[0]["known_seen_nll_before"]


def test_not_healed_is_status_3_and_the_result_is_written_all_the_same(tmp_path, base):
    path = write_config(tmp_path / "retrofit.yaml", RETROFIT, base=str(base), output=str(tmp_path / "out"))
    done = run("train.py", path, "retrofit.learning_rate=3", "retrofit.steps=3", "retrofit.dense_control=false")
    assert done.returncode == 3, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    losses = results["losses"]
    missed = losses[MEMORY]["after"] - losses[BASE]["after"] - 0.01
    assert not results["healed"]
    assert missed > 0
    assert f"train.py: not healed: validation loss {losses[MEMORY]['after']:.4f} is {missed:.4f} above" in done.stderr
    assert done.stdout.endswith(f"wrote {tmp_path / 'out'}\n")
    files.load(tmp_path / "out")


@pytest.mark.parametrize(("mode", "margin"), [("add", 0.01), ("replace", 0.05)])
def test_the_margin_follows_the_mode_unless_it_is_given(tmp_path, base, mode, margin):
    for given, expected in ((None, margin), (7.0, 7.0)):
        settings = {"steps": 1, "dense_control": False, "learning_rate": 0.0, "table_learning_rate": 0.0}
        sections = {"memory": {"mode": mode}, "retrofit": {**settings, "margin": given}}
        config = config_of(RETROFIT, tmp_path / str(given), base=str(base), **sections)
        results = retrofit(config).results
        assert results["margin"] == expected
        above = results["losses"][MEMORY]["after"] - results["losses"][BASE]["after"]
        assert results["healed"] == (above <= expected)


def test_a_loss_that_is_no_number_is_not_healed():
    assert not gate(2.0, math.nan, 0.01)[0]
    assert gate(2.0, 2.01, 0.01)[0]


def outcome(folder):
    """What a finished retrofit leaves, times left out."""
    results = json.loads((folder / "results.json").read_text())
    counts = load_counts(folder / COUNTS_FILE, COUNTED)["model.memory.0"]
    numbers = {key: results[key] for key in ("losses", "curves", "parameters", "frozen", "verdict")}
    return state_fingerprint(files.load(folder)[0]), counts.reads_N.tolist(), numbers


LONG = {"retrofit": {"steps": 40}, "trainer": {"save_strategy": "steps", "save_steps": 10}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, base):
    """The outcome of a retrofit of LONG that nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    retrofit(config_of(RETROFIT, folder, base=str(base), **LONG))
    return outcome(folder)


@pytest.mark.parametrize("killed_in", ["trainer", "dense_control"])
def test_a_killed_retrofit_goes_on_and_ends_with_the_same_bits_and_losses(tmp_path, base, uninterrupted, killed_in):
    output = str(tmp_path / "stopped")
    path = write_config(tmp_path / "stopped.yaml", RETROFIT, output=output, base=str(base), **LONG)
    process = start("train.py", path, folder=tmp_path)
    first = tmp_path / "stopped" / killed_in / "checkpoint-10"
    while process.is_alive() and not is_written(first / "trainer_state.json"):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (tmp_path / "stopped" / "results.json").exists(), "the run ended before it was killed"
    done = run("train.py", path)
    assert done.returncode == 0, done.stderr
    resumed_at = json.loads((tmp_path / "stopped" / "results.json").read_text())["resumed_at"]
    assert resumed_at[MEMORY] >= 10 or killed_in == "dense_control", "what was healed was kept"
    assert resumed_at[DENSE] >= 10 or killed_in == "trainer"
    assert outcome(tmp_path / "stopped") == uninterrupted


REFUSALS = [
    ({"base": None}, "base is null, must be text"),
    ({"base": "runs/nowhere"}, "base runs/nowhere cannot be retrofitted: it is no folder, and as a name on the hub: "),
    ({"memory": {"layers": [3]}}, r"memory layers \[3\] asked for, the model has layers 0 to 2"),
    ({"memory": {"top_k": 17}}, "memory.top_k is 17, must be at most memory.num_keys = 16"),
    ({"text": {"num_train": 10**6}}, "the text is too short: .* tokens are left for training, 1000000 windows"),
    ({"text": {"limit": 3}}, "the text is too short: .* tokens are left for validation"),
    ({"text": {"length": 65}}, "text.length is 65, base .* has 64 positions"),
    ({"text": {"files": ["absent.txt"], "builtin_facts": False}}, "no text file absent.txt"),
    ({"text": {"files": ["a.txt"]}}, "text comes from one of them, so write text.builtin_facts=false"),
    ({"checkpoint": "x"}, "checkpoint is a setting of learn and compare, not of retrofit"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_what_does_not_fit_is_refused_before_anything_is_trained(tmp_path, base, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        retrofit(config_of(RETROFIT, tmp_path / "out", **{"base": str(base), **changes}))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_empty_text_is_refused(tmp_path, base):
    (tmp_path / "empty.txt").touch()
    text = {"files": [str(tmp_path / "empty.txt")], "builtin_facts": False}
    config = config_of(RETROFIT, tmp_path / "out", base=str(base), text=text)
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        retrofit(config)


def test_a_base_with_memory_is_refused(tmp_path, healed):
    folder, _, _ = healed
    config = config_of(RETROFIT, tmp_path / "out", base=str(folder))
    with pytest.raises(ValueError, match="cannot be retrofitted: it has memory already"):
        retrofit(config)


def test_a_base_is_never_written_to(base):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    config = config_of(RETROFIT, base.parent / "base", base=str(base))
    with pytest.raises(ValueError, match="output and base are both"):
        retrofit(config)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" + bytes(7)), "cannot be retrofitted"),
        (lambda folder: [p.unlink() for p in folder.glob("tokenizer*")], "no tokenizer in"),
        (lambda folder: lose_a_weight(folder), "1 of its weights are missing, model.norm.weight first"),
        (lambda folder: longer_tokenizer(folder), "has 401 tokens, the model 400"),
    ],
    ids=["no weights", "truncated weights", "no tokenizer", "a weight missing", "tokens beyond the embedding"],
)
def test_a_base_that_is_not_whole_is_refused(tmp_path, base, spoil, message):
    shutil.copytree(base, tmp_path / "base")
    spoil(tmp_path / "base")
    with pytest.raises(ValueError, match=message) as refused:
        load_base(config_of(RETROFIT, tmp_path / "out", base=str(tmp_path / "base")))
    assert "\n" not in str(refused.value)


def test_a_base_of_the_configs_that_is_not_there_is_refused_with_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"it is no folder \(python examples/tiny_base\.py runs/base makes it\), and"):
        load_base(config_of(RETROFIT, tmp_path / "out", base="runs/base"))


def lose_a_weight(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(folder, state_dict=state)


def longer_tokenizer(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    (folder / "tokenizer.model").unlink()
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("retrofit.margin=-1", "retrofit.margin is -1.0, must be at least 0"),
        ("retrofit.dtype=int8", "retrofit.dtype is 'int8', must be"),
        ("text.lenght=3", "text.lenght is not a setting; did you mean text.length?"),
        ("base=absent", "base absent cannot be retrofitted: it is no folder, and as a name on the hub: "),
        ("trainer.learning_rate=1", "trainer.learning_rate cannot be set in job retrofit: it follows from"),
        ("text.builtin_facts=false", "no text to heal on: name text.files or text.dataset"),
        ("data.num_new=3", "data is a setting of pretrain, pretrain_text, learn and compare, not of retrofit"),
        ("trainer.weight_decay=0.9", "it follows from pretrain.weight_decay, retrofit.weight_decay or learn.method"),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path, base, override, message):
    path = write_config(tmp_path / "retrofit.yaml", RETROFIT, base=str(base), output=str(tmp_path / "out"))
    assert message in refusal("train.py", path, override)


def test_a_retrofit_stopped_after_healing_does_not_heal_again_and_ends_the_same(tmp_path, base, monkeypatch):
    small = {"retrofit": {"steps": 3}}
    whole = retrofit(config_of(RETROFIT, tmp_path / "whole", base=str(base), **small))
    config = config_of(RETROFIT, tmp_path / "stopped", base=str(base), **small)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("memlayer.jobs.retrofit.count", stop)
        with pytest.raises(KeyboardInterrupt) as stopped:
            retrofit(config)
    assert stopped.value.__notes__ == ["stopped; the same command goes on"]
    assert not (tmp_path / "stopped" / "config.json").exists()
    unfinished = tmp_path / "stopped" / ".unfinished"
    healed_at = (unfinished / "model.safetensors").stat().st_mtime_ns
    again = retrofit(config)
    assert (tmp_path / "stopped" / "model.safetensors").stat().st_mtime_ns == healed_at
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    assert again.results["losses"] == whole.results["losses"]
    assert not unfinished.exists()
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == files
    # A third time there is nothing to do.
    found = retrofit(config)
    assert found.results == json.loads(json.dumps(again.results))
    assert state_fingerprint(found.model) == state_fingerprint(again.model)


def test_a_retrofit_of_another_base_or_text_is_refused_by_a_finished_folder(tmp_path, base, healed):
    folder, _, _ = healed
    mode = {"mode": load_config(folder / "config.yaml").memory.mode}
    other = shutil.copytree(base, tmp_path / "base")
    assert retrofit(config_of(RETROFIT, folder, base=str(other), memory=mode)).results["losses"]
    lose = AutoModelForCausalLM.from_pretrained(other)
    torch.nn.init.zeros_(lose.lm_head.weight)
    lose.save_pretrained(other)
    with pytest.raises(ValueError, match="SHA-256 of base was"):
        retrofit(config_of(RETROFIT, folder, base=str(other), memory=mode))
    (tmp_path / "text.txt").write_text("\n\n".join(reversed([*load_documents(limit=4000)])), encoding="utf-8")
    text = {"files": [str(tmp_path / "text.txt")], "builtin_facts": False}
    config = config_of(RETROFIT, folder, base=str(base), memory=mode, text=text)
    with pytest.raises(ValueError, match="SHA-256 of text was"):
        retrofit(config)


@pytest.mark.parametrize("rate", [1e30, 0.0])
def test_what_is_no_number_is_refused_and_nothing_is_written(tmp_path, base, rate):
    base = shutil.copytree(base, tmp_path / "base")
    if not rate:
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.nn.init.constant_(model.lm_head.weight, math.nan)
        model.save_pretrained(base)
    config = config_of(RETROFIT, tmp_path / "out", base=str(base), retrofit={"learning_rate": rate})
    said = "a retrofit.learning_rate=1e.30 may be too high" if rate else "the validation loss of base .* is nan"
    with pytest.raises(ValueError, match=said):
        retrofit(config)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.slow
def test_two_processes_that_share_the_table_heal_as_one_does(tmp_path, base, healed):
    folder, alone, _ = healed
    mode = alone.results["mode"]
    path = write_config(tmp_path / "retrofit.yaml", RETROFIT, output=str(tmp_path / "two"), base=str(base))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", str(path)]
    command = [sys.executable, *launch, f"memory.mode={mode}", "table.shards=2"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=240)
    assert (tmp_path / "two" / "results.json").is_file(), done.stderr
    losses = json.loads((tmp_path / "two" / "results.json").read_text())["losses"]
    for name, expected in alone.results["losses"].items():
        assert losses[name] == pytest.approx(expected, abs=1e-4), name
    one, two = (files.load(each)[0].state_dict() for each in (folder, tmp_path / "two"))
    assert min(float(torch.isclose(one[name], two[name], atol=1e-4).float().mean()) for name in one) > 0.98

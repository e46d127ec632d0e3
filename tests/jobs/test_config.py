"""A config is read strictly, by the types of its fields, and what is written is what is read back."""

import os
import re
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.jobs.config import ANY_RUN, LearnRun, PretrainRun, RetrofitRun, facts_told, load_config, to_yaml
from memlayer.jobs.config_help import attributes, describe_settings
from memlayer.jobs.learn_settings import (
    ANY_LEARN,
    FullConfig,
    LearnConfig,
    LoraConfig,
    MistConfig,
    SparseMaskConfig,
    SparseMemoryConfig,
)
from memlayer.jobs.sections import DataConfig, TextConfig
from memlayer.jobs.store_settings import HebbianConfig, NearestConfig, RetrievalConfig
from memlayer.jobs.typed import members, name_of, names, typed_fields
from memlayer.layers.config import MemoryConfig
from memlayer.methods import METHODS, STORES

MINIMAL = "job: learn\noutput: runs/x\ncheckpoint: runs/base\n"
RUN = LearnRun(output="runs/x", checkpoint="runs/base")
HEAL = "job: retrofit\noutput: runs/x\nbase: runs/base\n"


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_not_said_has_its_default(tmp_path):
    assert load_config(write(tmp_path, MINIMAL)) == RUN
    assert load_config(write(tmp_path, MINIMAL + "learn:\n#  num_rows: 7\ntrainer:\n")) == RUN
    config = load_config(write(tmp_path, "job: pretrain\noutput: runs/x\nmemory: {top_k: 8}\n"))
    assert config == PretrainRun(output="runs/x", memory=MemoryConfig(layers=[2], num_keys=256, top_k=8))


def test_sections_and_overrides_are_applied_in_order(tmp_path):
    path = write(tmp_path, MINIMAL + "learn:\n  num_rows: 7\n  protect: 3\n")
    config = load_config(path, ["learn.protect=4", "learn.protect=5", "data.num_new=2", "trainer.max_grad_norm=0.5"])
    assert config.learn == SparseMemoryConfig(num_rows=7, protect=5)
    assert config.data == DataConfig(num_new=2)
    assert config.trainer == {"max_grad_norm": 0.5}


NAMES = ["2026_11_27", "010", "12:30", "no", "1e3", "true", "2026-11-27", "0x1F", ".5", "a=b", "mein Ordner/ä 日本"]
NAMES_FOR_SHELLS = ["runs/x #1", "runs/x: y", "[x]", "{x", "'x'", " x", "C:\\runs"]


@pytest.mark.parametrize("name", NAMES + NAMES_FOR_SHELLS)
def test_text_is_the_text_after_the_first_equals_sign(tmp_path, name):
    path = write(tmp_path, MINIMAL)
    config = load_config(path, [f"{key}={name}" for key in ("output", "data.facts", "checkpoint", "trainer.run_name")])
    assert config == replace(RUN, output=name, checkpoint=name, data=DataConfig(facts=name), trainer={"run_name": name})
    assert load_config(write(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize("name", NAMES)
def test_text_in_a_file_is_what_is_written_there(tmp_path, name):
    text = f"job: retrofit\noutput: {name}\nbase: {name}\ntext: {{files: [{name}]}}\ntrainer: {{run_name: {name}}}\n"
    config = load_config(write(tmp_path, text))
    expected = RetrofitRun(output=name, base=name, text=TextConfig(files=[name]), trainer={"run_name": name})
    assert config == expected


@pytest.mark.parametrize(
    ("value", "files"),
    [
        ("a.txt", ["a.txt"]),
        ("2026_11_27", ["2026_11_27"]),
        ("a b.txt, c.txt", ["a b.txt, c.txt"]),
        ("[a.txt,010, ~/b: c.txt]", None),
        ("[a.txt,010, '~/b: c #1.txt']", ["a.txt", "010", "HOME/b: c #1.txt"]),
        ("[a.txt", ["[a.txt"]),
    ],
)
def test_one_file_is_a_list_of_one_and_brackets_hold_several(tmp_path, value, files):
    path = write(tmp_path, HEAL)
    if files is None:
        with pytest.raises(ValueError, match=r"text\.files\[2\] is a section, must be text"):
            load_config(path, [f"text.files={value}"])
    else:
        home = os.path.expanduser("~")
        assert load_config(path, [f"text.files={value}"]).text.files == [f.replace("HOME", home) for f in files]


def test_a_mapping_with_names_of_somebody_else_is_added_to_or_replaced_whole(tmp_path):
    text = "job: pretrain_text\noutput: x\nmodel: {settings: {model_type: llama, hidden_size: 8}}\n"
    path = write(tmp_path, text + "text: {sources: {a: {files: [a.txt]}}}\n")
    more = ["model.settings.rms_norm_eps=1e-5", "text.sources.b.facts=true", "text.sources.b.weight=0.5"]
    config = load_config(path, more)
    assert config.model.settings == {"model_type": "llama", "hidden_size": 8, "rms_norm_eps": 1e-5}
    assert {name: source.weight for name, source in config.text.sources.items()} == {"a": 1.0, "b": 0.5}
    other = load_config(path, ["model.settings={model_type: gpt2, n_embd: 4}"])
    assert other.model.settings == {"model_type": "gpt2", "n_embd": 4}
    for each in (config, other):
        assert load_config(write(tmp_path, to_yaml(each))) == each


def test_which_facts_a_run_pretrained_on_follows_from_its_job_and_its_sources(tmp_path):
    few = DataConfig(num_known=5)
    assert facts_told(PretrainRun(output="x", data=few)) == (few, True)
    text = "job: pretrain_text\noutput: x\ndata: {num_known: 5}\ntext: {sources: {a: {files: [a]}, b: {facts: true}}}\n"
    path = write(tmp_path, text)
    assert facts_told(load_config(path)) == (few, True)
    assert facts_told(load_config(path, ["text.sources.b.unseen_wordings=false"])) == (few, False)
    assert facts_told(load_config(path, ["text.sources.b.weight=0"])) is None
    assert facts_told(RUN) is None
    assert facts_told(None) is None


def test_a_leading_tilde_is_the_home_folder_in_files_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    config = load_config(write(tmp_path, "job: learn\noutput: ~/runs\ncheckpoint: a~/b\n"), ["data.facts=~/f.jsonl"])
    assert (config.output, config.checkpoint, config.data.facts) == ("/somewhere/runs", "a~/b", "/somewhere/f.jsonl")


def test_null_is_nothing_unless_it_is_quoted(tmp_path):
    assert load_config(write(tmp_path, MINIMAL + "data: {facts: null}\n")).data.facts is None
    assert load_config(write(tmp_path, MINIMAL + "data: {facts: 'null'}\n")).data.facts == "null"
    assert load_config(write(tmp_path, MINIMAL + "data: {facts: a}\n"), ["data.facts=null"]).data.facts is None


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_a_number_in_any_notation_is_a_number(tmp_path, written):
    in_file = load_config(write(tmp_path, MINIMAL + f"learn:\n  learning_rate: {written}\n"))
    overridden = load_config(write(tmp_path, MINIMAL), [f"learn.learning_rate={written}"])
    assert in_file.learn.learning_rate == overridden.learn.learning_rate == 0.0001


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("torch_empty_cache_steps=010", 10),
        ("bf16=yes", True),
        ("disable_tqdm=null", None),
        ("save_strategy=no", "no"),
        ("report_to=none", "none"),
        ("report_to=[tensorboard,mlflow]", ["tensorboard", "mlflow"]),
        ("gradient_checkpointing_kwargs={a: false, b: [1, 2.5, c]}", {"a": False, "b": [1, 2.5, "c"]}),
    ],
)
def test_settings_of_the_trainer_have_the_types_of_training_arguments(tmp_path, override, value):
    config = load_config(write(tmp_path, MINIMAL), [f"trainer.{override}"])
    assert list(config.trainer.values()) == [value]
    assert type(*config.trainer.values()) is type(value)
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_which_settings_there_are_follows_from_job_and_method(tmp_path):
    kinds = {each.method: each for each in get_args(ANY_LEARN)}
    assert list(kinds) == [*METHODS, *STORES]
    for method, kind in kinds.items():
        config = load_config(write(tmp_path, MINIMAL), [f"learn.method={method}"])
        assert config.learn == kind()
        assert load_config(write(tmp_path, to_yaml(config))) == config
    assert {name_of(job) for job in members(ANY_RUN)} == {
        "pretrain",
        "pretrain_text",
        "compare_pretraining",
        "retrofit",
        "augment",
        "learn",
        "compare",
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FullConfig(method="lora"), "learn.method is 'lora', must be 'full'"),
        (lambda: SparseMemoryConfig(learning_rate=float("nan")), "learn.learning_rate is nan, must be at least 0"),
        (lambda: SparseMemoryConfig(statements=0, questions=0), "there is nothing to teach a fact with"),
        (lambda: LoraConfig(lora_rank=0), "learn.lora_rank is 0, must be at least 1"),
        (lambda: RetrievalConfig(min_share=-0.1), "learn.min_share is -0.1, must be at least 0"),
        (lambda: RetrievalConfig(shown=0), "learn.shown is 0, must be at least 1"),
        (lambda: RetrievalConfig(frame="Known:"), "learn.frame is 'Known:', must hold {lesson} once"),
        (lambda: NearestConfig(alpha=1.0), "learn.alpha is 1.0, must be below 1"),
        (lambda: HebbianConfig(alpha=1.1), "learn.alpha is 1.1, must be at most 1"),
        (lambda: HebbianConfig(temperature=0.0), "learn.temperature is 0.0, must be above 0"),
        (lambda: HebbianConfig(num_neighbours=0), "learn.num_neighbours is 0, must be at least 1"),
        (lambda: NearestConfig(min_similarity=-1.5), "learn.min_similarity is -1.5, must be at least -1"),
        (lambda: RetrievalConfig(statements=0, questions=0), "there is nothing to teach a fact with"),
        (lambda: SparseMaskConfig(density=0.0), "learn.density is 0.0, must be above 0 and at most 1"),
        (lambda: SparseMaskConfig(drop=1.0), "learn.drop is 1.0, must be at least 0 and below 1"),
        (lambda: MistConfig(density=2.0), "learn.mist.density is 2.0, must be above 0 and at most 1"),
        (lambda: SparseMemoryConfig(mist=MistConfig(paper_code=True)), "learn.mist.paper_code moves product keys"),
        (lambda: MistConfig(epochs=0), "learn.mist.epochs is 0, must be at least 1"),
        (lambda: SparseMaskConfig(momentum=0.9), "learn.momentum is 0.9 and learn.optimizer adamw: it is of sgd"),
        (lambda: TextConfig(), "no text to heal on"),
        (lambda: TextConfig(files=["a"], dataset="b"), "text.files and text.dataset are both set"),
        (lambda: replace(RUN, trainer={"optim": "adafactor"}), "trainer.optim cannot be set in job learn"),
    ],
)
def test_what_is_made_in_python_is_checked_alike(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL + "colour: red\n", [], "colour is not a setting"),
        (MINIMAL + "learn:\n  num_row: 5\n", [], "learn.num_row is not a setting; did you mean learn.num_rows?"),
        (MINIMAL, ["learning_rate=3"], "learning_rate is not a setting; did you mean learn.learning_rate?"),
        (MINIMAL, ["save_steps=3"], "save_steps is not a setting; did you mean trainer.save_steps?"),
        (MINIMAL, ["learn.method=full", "learn.protect=7"], "learn.protect is a setting of sparse_memory, not of full"),
        (
            MINIMAL,
            ["learn.method=retrieval", "learn.learning_rate=1"],
            "sparse_mask and ridge, not of retrieval",
        ),
        (MINIMAL, ["pretrain.steps=3"], "pretrain is a setting of pretrain and pretrain_text, not of learn"),
        (MINIMAL, ["learn.num_rows=many"], "learn.num_rows is 'many', must be a whole number"),
        (MINIMAL, ["learn.num_rows=1.5"], "learn.num_rows is '1.5', must be a whole number"),
        (MINIMAL, ["learn.learning_rate=inf"], "learn.learning_rate is 'inf', must be a number"),
        (MINIMAL, ["learn.protect="], "learn.protect is '', must be a whole number"),
        (MINIMAL, ["output="], "output is empty"),
        (MINIMAL, ["output=null"], "output is null, must be text"),
        (MINIMAL, ["learn=2"], "learn is '2', must be a section of key: value"),
        (MINIMAL + "learn: {protect: 1}\n", ["learn=2"], "learn is a section: write learn.key=value"),
        (MINIMAL + "learn: 2\n", ["learn.protect=3"], "learn is '2', so learn.protect cannot be set"),
        (MINIMAL, ["learn.num_rows"], "override 'learn.num_rows' is not of the form section.key=value"),
        (MINIMAL, ["trainer.bf16=maybe"], "trainer.bf16 is 'maybe', must be true or false or 'auto'"),
        (MINIMAL, ["trainer.max_grad_norm=high"], "trainer.max_grad_norm is 'high', must be a number"),
        (HEAL, ["text.files=a", "memory.mode=both"], "memory.mode is 'both', must be 'replace' or 'add'"),
        (HEAL, ["text.files=[a #1]"], "text.files is '[a #1]', in brackets but not YAML; put its items in quotes"),
        (HEAL, ["text.files=a", "text.builtin_facts=maybe"], "text.builtin_facts is 'maybe', must be true or false"),
        ("job: learn\noutput: runs/x\n", [], "checkpoint is not set"),
        (
            "output: runs/x\n",
            [],
            "job is not set, must be 'pretrain' or 'pretrain_text' or 'compare_pretraining' or 'retrofit' or",
        ),
        ("job: [pretrain\n", [], "not YAML: while parsing a flow sequence"),
        ("job: learn\njob: learn\n", [], "the key job is there twice, line 2"),
        ("- a\n- b\n", [], "the file is a list, must be sections of key: value"),
    ],
)
def test_a_bad_config_is_refused_in_one_line_with_file_and_key(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load_config(write(tmp_path, text), overrides)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(f"{tmp_path / 'config.yaml'}: ")


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config at .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


NUMBERS = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1).filter(lambda s: s[0] != "~")


@settings(max_examples=60, deadline=None)
@given(
    rate=NUMBERS,
    rows=st.integers(1),
    facts=st.none() | WORDS,
    output=WORDS,
    files=st.lists(WORDS, min_size=1),
    trainer=st.fixed_dictionaries(
        {}, optional={"max_grad_norm": NUMBERS, "save_total_limit": st.none() | st.integers(), "run_name": WORDS}
    ),
    bf16=st.booleans(),
)
def test_a_written_config_is_read_back_as_it_was(tmp_path_factory, rate, rows, facts, output, files, trainer, bf16):
    learn = SparseMemoryConfig(learning_rate=rate, num_rows=rows)
    common = {"output": output, "trainer": trainer | {"bf16": bf16}}
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    for config in (
        LearnRun(checkpoint=output, learn=learn, data=DataConfig(facts=facts), **common),
        RetrofitRun(base=output, text=TextConfig(files=files), memory=MemoryConfig([rows]), **common),
    ):
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(path) == config


def test_every_setting_is_explained_and_help_shows_it_once_with_its_default():
    shown = describe_settings()
    for name in names(ANY_RUN):
        assert len(re.findall(rf"^  {re.escape(name)} [=(]", shown, re.MULTILINE)) <= len(METHODS)
    for line in ("pretrain.learning_rate = 0.002 ", "checkpoint (required) ", "memory.num_keys = 256 "):
        assert shown.count(f"\n  {line}") == 1
    assert re.search(r"^  learn\.optimizer = sgd .*\(sgd \| adam\)$", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines())) < 160


@pytest.mark.parametrize("job", members(ANY_RUN), ids=name_of)
def test_every_field_has_its_line_in_a_docstring(job):
    kinds = [job, *(section for _, hint in typed_fields(job) for section in members(hint)), LearnConfig]
    for kind in kinds:
        missing = [f.name for f, hint in typed_fields(kind) if not members(hint) and f.name not in attributes(kind)]
        assert missing == [], kind

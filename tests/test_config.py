"""A config is read strictly, and what is written is what is read back."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.config import (
    LearnConfig,
    MemoryConfig,
    PretrainConfig,
    RunConfig,
    describe_fields,
    load_config,
    to_yaml,
)

MINIMAL = "job: pretrain\noutput: runs/x\n"


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_what_is_not_said_has_its_default(tmp_path):
    assert load_config(write(tmp_path, MINIMAL)) == RunConfig(job="pretrain", output="runs/x")


def test_sections_and_overrides_are_applied_in_order(tmp_path):
    path = write(tmp_path, MINIMAL + "memory:\n  layers: [1, 2]\n  top_k: 8\nlearn:\n  num_rows: 7\n")
    config = load_config(path, ["memory.top_k=16", "data.facts=mine.jsonl", "trainer.max_grad_norm=0.5"])
    assert config.memory == MemoryConfig([1, 2], num_keys=256, top_k=16)
    assert config.learn == LearnConfig(num_rows=7)
    assert config.data.facts == "mine.jsonl"
    assert config.trainer == {"max_grad_norm": 0.5}


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_a_number_in_any_notation_is_a_number(tmp_path, written):
    in_file = load_config(write(tmp_path, MINIMAL + f"learn:\n  learning_rate: {written}\n"))
    overridden = load_config(write(tmp_path, MINIMAL), [f"learn.learning_rate={written}"])
    assert in_file.learn.learning_rate == overridden.learn.learning_rate == 0.0001


def test_numbers_for_the_trainer_are_numbers_too(tmp_path):
    assert load_config(write(tmp_path, MINIMAL), ["trainer.adam_epsilon=1e-4"]).trainer == {
        "adam_epsilon": 0.0001
    }


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL + "colour: red\n", [], "'colour'.*not in|Key 'colour'"),
        (MINIMAL + "learn:\n  num_row: 5\n", [], r"num_row.*\(at learn\.num_row\)"),
        (MINIMAL, ["learn.num_row=5"], r"num_row.*\(at learn\.num_row\)"),
        (MINIMAL, ["learn.num_rows=many"], r"'many'.*\(at learn\.num_rows\)"),
        (MINIMAL, ["learn.num_rows=1.5"], r"1\.5.*\(at learn\.num_rows\)"),
        (MINIMAL, ["memory.layers=2"], r"\(at memory\.layers\)|layers"),
        (MINIMAL, ["memory=2"], r"int is not a subclass of MemoryConfig\. value: 2"),
        (MINIMAL, ["learn.num_rows"], r"override 'learn\.num_rows' is not of the form section\.key=value"),
        (MINIMAL, ["memory.mode=both"], "memory.mode is 'both', must be 'replace' or 'add'"),
        ("output: runs/x\n", [], "job"),
        ("job: [pretrain\n", [], r"config\.yaml: .*line 2"),
        ("- a\n- b\n", [], r"config\.yaml"),
    ],
)
def test_a_bad_config_is_refused_with_file_and_key(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text), overrides)


def test_a_refusal_is_one_line(tmp_path):
    with pytest.raises(ValueError) as refusal:
        load_config(write(tmp_path, MINIMAL), ["learn.num_rows=many"])
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(str(tmp_path))


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config at .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1).filter(
    lambda s: "${" not in s
)


@settings(max_examples=60, deadline=None)
@given(
    rate=FLOATS,
    num_rows=st.integers(),
    facts=st.none() | WORDS,
    layers=st.lists(st.integers(), max_size=4),
    share=st.booleans(),
    output=WORDS,
    trainer=st.dictionaries(
        st.text("abc_", min_size=1), FLOATS | st.booleans() | st.integers() | st.none(), max_size=3
    ),
)
def test_a_written_config_is_read_back_as_it_was(
    tmp_path_factory, rate, num_rows, facts, layers, share, output, trainer
):
    config = RunConfig(job="learn", output=output, trainer=trainer)
    config.learn.learning_rate, config.learn.num_rows = rate, num_rows
    config.data.facts = facts
    config.memory = MemoryConfig(layers, share=share)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_help_lists_every_setting_of_every_section_with_its_default():
    lines = describe_fields()
    for section in dataclasses.fields(RunConfig):
        assert [line for line in lines if line.startswith(section.name)], section.name
    assert f"pretrain.learning_rate = {PretrainConfig().learning_rate}" in lines
    assert "job = (required)" in lines
    assert "data.facts = None" in lines
    assert len(lines) == len({line.split(" = ")[0] for line in lines})


def test_help_shows_the_defaults_that_a_run_gets(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    lines = describe_fields()
    assert f"memory.num_keys = {config.memory.num_keys}" in lines
    assert f"memory.layers = {config.memory.layers}" in lines

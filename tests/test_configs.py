"""The configs in configs/: each opens with the command that runs it, is accepted, and says only what differs."""

import dataclasses

import pytest
import yaml
from commands import REPO

from memlayer.commands.training import JOBS
from memlayer.jobs.config import (
    ANY_RUN,
    AugmentRun,
    ComparePretrainingRun,
    CompareRun,
    LearnRun,
    PretrainRun,
    PretrainTextRun,
    RetrofitRun,
    load_config,
)
from memlayer.jobs.learn_settings import LoraConfig
from memlayer.jobs.pretrain_settings import ControlsConfig, MixtureConfig, SourceConfig
from memlayer.jobs.sections import LessonsConfig, TextConfig
from memlayer.jobs.typed import members, name_of

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))


# A recipe may name what it is about though it is the default.
SUBJECT = {"job", "memory.layers", "memory.num_keys"}


def default_of(config):
    """A run of the same job and method that says nothing else."""
    return {
        "pretrain": lambda: PretrainRun(output="-"),
        "pretrain_text": lambda: PretrainTextRun(output="-", text=MixtureConfig({"-": SourceConfig(files=["-"])})),
        "retrofit": lambda: RetrofitRun(output="-", base="-", text=TextConfig(files=["-"])),
        "augment": lambda: AugmentRun(output="-", base="-", lessons=LessonsConfig(files=["-"])),
        "compare_pretraining": lambda: ComparePretrainingRun(output="-", controls=ControlsConfig(config=__file__)),
        "compare": lambda: CompareRun(output="-", checkpoint="-", methods=config.methods),
        "learn": lambda: LearnRun(output="-", checkpoint="-", learn=type(config.learn)()),
    }[config.job]()


def repeated_defaults(said, default, prefix=""):
    """The dotted names of what a config says though it is the default."""
    found = []
    for key, value in said.items():
        ours = getattr(default, key)
        if dataclasses.is_dataclass(ours):
            found += repeated_defaults(value, ours, f"{prefix}{key}.")
        elif value == ours and f"{prefix}{key}" != "learn.method":  # that decides which defaults there are
            found.append(prefix + key)
    return found


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_its_command_and_is_accepted(path):
    assert path.read_text().splitlines()[0] == f"# python train.py configs/{path.name}"
    config = load_config(path)
    assert config.job in JOBS
    assert config.output == f"runs/{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_only_what_differs_from_the_defaults(path):
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(repeated_defaults(said, default_of(load_config(path)))) - SUBJECT == set()


def test_what_repeats_a_default_is_found():
    said = yaml.safe_load("{job: learn, seed: 0, learn: {method: lora, lora_rank: 32, statements: 2}}")
    default = LearnRun(output="-", checkpoint="-", learn=LoraConfig())
    assert repeated_defaults(said, default) == ["job", "seed", "learn.lora_rank"]


def test_every_job_can_be_run():
    assert list(JOBS) == [name_of(job) for job in members(ANY_RUN)]


def test_what_learns_starts_from_what_another_config_writes():
    configs = [load_config(path) for path in CONFIGS]
    outputs = {config.output for config in configs if config.job not in ("learn", "compare")}
    assert {config.checkpoint for config in configs if config.job in ("learn", "compare")} <= outputs

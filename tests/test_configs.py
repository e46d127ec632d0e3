"""The configs in configs/: each opens with the command that runs it, is accepted, and says only what differs."""

import dataclasses
import runpy

import pytest
import yaml
from commands import REPO
from omegaconf import OmegaConf

from memlayer.config import MISSING, RunConfig, load_config
from memlayer.methods import METHODS

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))
JOBS = runpy.run_path(str(REPO / "train.py"))["JOBS"]


# A recipe may name what it is about though it is the default.
SUBJECT = {"learn.method", "memory.layers"}


def repeated_defaults(said, default, prefix=""):
    """The dotted names of what a config says though it is the default."""
    found = []
    for key, value in said.items():
        ours = getattr(default, key)
        if dataclasses.is_dataclass(ours):
            found += repeated_defaults(value, ours, f"{prefix}{key}.")
        elif value == ours:
            found.append(prefix + key)
    return found


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_its_command_and_is_accepted(path):
    assert path.read_text().splitlines()[0] == f"# python train.py configs/{path.name}"
    config = load_config(path)
    assert config.job in JOBS
    assert config.learn.method in METHODS
    assert config.output == f"runs/{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_only_what_differs_from_the_defaults(path):
    said = OmegaConf.to_container(OmegaConf.load(path))
    assert set(repeated_defaults(said, RunConfig())) - SUBJECT == set()


def test_what_repeats_a_default_is_found():
    said = yaml.safe_load("{job: learn, seed: 0, learn: {num_rows: 3, statements: 3}}")
    default = RunConfig()
    default.learn.statements = 3
    assert default.job == MISSING
    assert repeated_defaults(said, default) == ["seed", "learn.statements"]


def test_what_learns_starts_from_what_another_config_writes():
    configs = [load_config(path) for path in CONFIGS]
    outputs = {config.output for config in configs if config.job == "pretrain"}
    assert {config.checkpoint for config in configs if config.job == "learn"} <= outputs

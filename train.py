"""Pretrain a memory model, retrofit memory into a pretrained one and heal it, or teach one new facts.

    python train.py configs/pretrain.yaml
    python train.py configs/retrofit_smollm2_135m.yaml
    python train.py configs/learn_sparse_memory.yaml learn.learning_rate=0.5 output=runs/mine
    accelerate launch train.py configs/pretrain.yaml

The config is YAML; every setting can be overridden as section.key=value. --print-config shows the resolved
configuration and stops. Exit status: 0 done, 1 refused, 3 retrofitted and written but not healed, 130 or 143 stopped.
"""

import memlayer_kernels.short_waits  # noqa: F401, before anything loads torch

# isort: split
import argparse
import sys

from accelerate import PartialState

from memlayer import recipes
from memlayer.config import RunConfig, describe_fields, load_config, to_yaml
from memlayer.refusals import refusals
from memlayer.retrofit import retrofit
from memlayer.run_folder import is_finished

NOT_HEALED = 3


def pretrain(config: RunConfig) -> int:
    """Train a memory model from nothing."""
    recipes.pretrain(config)
    return 0


def heal(config: RunConfig) -> int:
    """Retrofit memory into a pretrained model, and say whether it healed."""
    retrofitted = retrofit(config)
    if PartialState().is_main_process:
        print(f"train.py: {retrofitted.results['verdict']}", file=sys.stderr)
    return 0 if retrofitted.healed else NOT_HEALED


def learn(config: RunConfig) -> int:
    """Teach new facts and write what changed."""
    recipes.learn_into_output(config)
    return 0


JOBS = {"pretrain": pretrain, "retrofit": heal, "learn": learn}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="settings and their defaults:\n  " + "\n  ".join(describe_fields()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    parser.add_argument(
        "--print-config", action="store_true", help="show the resolved configuration and stop"
    )
    arguments = parser.parse_args()
    with refusals("train.py"):
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(to_yaml(config), end="")
            return
        if config.job not in JOBS:
            raise ValueError(f"job is {config.job!r}, must be one of {sorted(JOBS)}")
        finished = is_finished(config.output)
        status = JOBS[config.job](config)
    if PartialState().is_main_process:
        print(f"{config.output} holds this result already" if finished else f"wrote {config.output}")
    PartialState().destroy_process_group()  # left to the end of the process, its threads sometimes abort it
    sys.exit(status)


if __name__ == "__main__":
    main()

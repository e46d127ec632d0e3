"""Pretrain a memory model, retrofit memory into a pretrained one, write study texts about lessons, teach them, or
compare methods that teach them.

    python train.py configs/pretrain.yaml
    python train.py configs/pretrain_text.yaml text.sources.mine.files=[my_text.jsonl] text.sources.facts.weight=0.1
    python train.py configs/compare_pretraining.yaml
    python train.py configs/retrofit_smollm2_135m.yaml
    python train.py configs/augment_lessons.yaml base=HuggingFaceTB/SmolLM2-1.7B-Instruct
    python train.py configs/learn_sparse_memory.yaml learn.learning_rate=0.5 output=runs/mine
    python train.py configs/learn_full.yaml data.facts=my_facts.jsonl output=runs/mine
    python train.py configs/compare.yaml output=runs/mine
    accelerate launch train.py configs/pretrain.yaml

The config is YAML; every setting can be overridden as section.key=value. --print-config shows the resolved
configuration and stops. Exit status: 0 done, 1 refused, 2 a wrong command line, 3 retrofitted and written but not
healed, 130 or 143 stopped.
"""

import memlayer_kernels.short_waits  # noqa: F401, before anything loads torch

# isort: split
import argparse
import sys

from accelerate import PartialState

from memlayer import __version__
from memlayer.jobs.augment import augment
from memlayer.jobs.compare import compare
from memlayer.jobs.compare_pretraining import compare_pretraining
from memlayer.jobs.config import ANY_RUN, RunConfig, load_config, to_yaml
from memlayer.jobs.config_help import describe_settings
from memlayer.jobs.learn import learn_into_output
from memlayer.jobs.pretrain import pretrain
from memlayer.jobs.pretrain_text import pretrain_text
from memlayer.jobs.retrofit import retrofit
from memlayer.jobs.run_folder import is_finished
from memlayer.jobs.typed import names
from memlayer.refusals import refusals

NOT_HEALED = 3


def train(config: RunConfig) -> int:
    """Train a memory model from nothing."""
    pretrain(config)
    return 0


def train_on_text(config: RunConfig) -> int:
    """Train a memory model from nothing on text."""
    pretrain_text(config)
    return 0


def weigh(config: RunConfig) -> int:
    """Train a memory model and its controls on the same text, and report what the memory earned."""
    compare_pretraining(config)
    return 0


def heal(config: RunConfig) -> int:
    """Retrofit memory into a pretrained model, and say whether it healed."""
    retrofitted = retrofit(config)
    if PartialState().is_main_process:
        print(f"train.py: {retrofitted.results['verdict']}", file=sys.stderr)
    return 0 if retrofitted.healed else NOT_HEALED


def write(config: RunConfig) -> int:
    """Let a language model write study texts about lessons."""
    augment(config)
    return 0


def teach(config: RunConfig) -> int:
    """Teach new facts and write what changed."""
    learn_into_output(config)
    return 0


def contest(config: RunConfig) -> int:
    """Teach the same by several methods, and report what each learned and forgot."""
    compare(config)
    return 0


JOBS = {
    "pretrain": train,
    "pretrain_text": train_on_text,
    "compare_pretraining": weigh,
    "retrofit": heal,
    "augment": write,
    "learn": teach,
    "compare": contest,
}


def main() -> None:
    arguments = parse(sys.argv[1:])
    with refusals("train.py"):
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(to_yaml(config), end="")
            return
        finished = is_finished(config.output)
        status = JOBS[config.job](config)
    if PartialState().is_main_process:
        print(f"{config.output} holds this result already" if finished else f"wrote {config.output}")
    PartialState().destroy_process_group()  # left to the end of the process, its threads sometimes abort it
    sys.exit(status)


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; options and overrides may come in any order."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="train.py CONFIG [section.key=value ...] [--print-config]",
        description=__doc__,
        epilog=f"settings and their defaults:\n\n{describe_settings()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")
    parser.add_argument("--version", action="version", version=f"memlayer {__version__}")
    arguments, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        parser.error(as_setting(unknown[0], words))
    if arguments.config is None:
        parser.error("no CONFIG is named; try train.py configs/pretrain.yaml, or --help for all settings")
    return arguments


def as_setting(option: str, words: list[str]) -> str:
    """What to write in place of an option that there is not."""
    name, equals, value = option.lstrip("-").partition("=")
    following = words[words.index(option) + 1 :] if option in words and not equals else []
    value = value or (following[0] if following else "VALUE")
    meant = [each for each in dict.fromkeys(names(ANY_RUN)) if each.split(".")[-1] == name.replace("-", "_")]
    if not meant:
        return f"there is no option {option}; settings are written without dashes, as section.key={value}: see --help"
    write = " or ".join(f"{each}={value}" for each in meant)
    return f"there is no option {option}; settings are written without dashes: {write}"


if __name__ == "__main__":
    main()

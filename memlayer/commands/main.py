"""Memory layers for language models: pretrain, retrofit, teach, measure, and take back.

    memlayer recipes                                                what can be run by name
    memlayer recipe learn_smollm2 > my.yaml                         one of them, to copy and edit
    memlayer retrofit attach_smollm2 base=runs/base text.files=[my_text.jsonl]
    memlayer learn smollm2 output=runs/mine learn.num_rows=200      a recipe; settings as section.key=value
    memlayer learn my.yaml                                          a file of yours
    memlayer eval runs/attach_smollm2 runs/mine
    memlayer patch show runs/mine/patch
    memlayer solve runs/attach_smollm2 runs/monday runs/tuesday runs/both
    accelerate launch -m memlayer pretrain                          several processes

commands, each with a --help of its own:
  pretrain              train a decoder with memory from nothing
  pretrain_text         the same on text of several sources
  compare_pretraining   train it beside controls on the same batches: does the memory earn it?
  retrofit              put memory into a pretrained decoder
  augment               let a language model write study texts about lessons
  learn                 teach facts or lessons
  compare               teach the same by several methods
  eval                  ask a checkpoint and what learning runs made of it
  patch                 show, apply, revert, merge, squash, delete or forget what was learned
  solve                 one set of rows for the lessons of several ridge runs, or without some of them
  recipes               list what the jobs, the first seven, can run by name
  recipe                print one of them

A recipe may be named without its job: memlayer learn smollm2 runs learn_smollm2; the pretraining jobs and
compare have one of their own name, which they run when none is named.
"""

import argparse
import difflib
import sys

from memlayer import __version__
from memlayer.commands import evaluating, solving, training
from memlayer.jobs import recipes
from memlayer.patch import __main__ as patching
from memlayer.refusals import refusals

PROGRAM = "memlayer"


def list_recipes(words: list[str]) -> None:
    """Print a line per recipe."""
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} recipes", description="Job, name and purpose of each recipe.")
    parser.parse_args(words)
    print(recipes.listed(), end="")


def print_recipe(words: list[str]) -> None:
    """Print one recipe."""
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} recipe", description="Print a recipe, to copy and edit.")
    parser.add_argument("name", metavar="NAME", help="as memlayer recipes lists it")
    name = parser.parse_args(words).name
    with refusals(PROGRAM):
        print(recipes.text_of(name), end="")


OTHERS = {
    "eval": lambda words: evaluating.main(f"{PROGRAM} eval", words),
    "patch": lambda words: patching.main(f"{PROGRAM} patch", words),
    "solve": lambda words: solving.main(f"{PROGRAM} solve", words),
    "recipes": list_recipes,
    "recipe": print_recipe,
}


def main() -> None:
    """Hand the command line over to the command that its first word names."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those above")
    parser.add_argument("--version", action="version", version=f"memlayer {__version__}")
    command, words = parser.parse_args(sys.argv[1:2]).command, sys.argv[2:]
    if command in training.JOBS:
        training.main_of_job(command, words)
    elif command in OTHERS:
        OTHERS[command](words)
    elif command is None:
        parser.error("no COMMAND is named; see memlayer --help")
    else:
        near = difflib.get_close_matches(command, [*training.JOBS, *OTHERS])
        meant = f"did you mean {' or '.join(near)}?" if near else "see memlayer --help"
        parser.error(f"there is no command {command}; {meant}")

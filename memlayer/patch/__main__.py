"""Look at a memory patch, apply it to a model folder, take it back, or make one patch of several.

    python -m memlayer.patch show runs/learn/patch
    python -m memlayer.patch apply runs/learn/patch runs/pretrain runs/patched
    python -m memlayer.patch revert runs/learn/patch runs/patched runs/as_before
    python -m memlayer.patch merge runs/one/patch runs/two/patch runs/merged --on-conflict ties
    python -m memlayer.patch squash runs/yesterday/patch runs/today/patch runs/both
    python -m memlayer.patch delete runs/learn/patch "ada lovelace" runs/without_ada
    python -m memlayer.patch forget runs/old_answers/patch runs/forgetting --strength 0.5

merge takes patches that were learned from the same model; squash takes a chain, each learned on top of the one before.
delete takes a lesson back out of a patch; `show` lists the lessons that a patch tells apart.
forget turns round a patch that taught answers which have changed: apply it to the model without that patch, then teach
the new answers.

OUT is a new folder, and complete once it is there.
"""

import argparse
import fnmatch
import shutil
import tempfile
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

from memlayer import __version__
from memlayer.decoders import files
from memlayer.decoders.attach import memory_tables
from memlayer.files import writing
from memlayer.patch.deleting import delete_lessons
from memlayer.patch.files import CARD_FILE, CONFIG_FILE, ROWS_FILE
from memlayer.patch.forgetting import forgetting_patch
from memlayer.patch.memory_patch import MemoryPatch
from memlayer.patch.merging import POLICIES, merge
from memlayer.patch.squashing import squash
from memlayer.refusals import refusals
from memlayer.slots.counts import COUNTS_FILE, load_counts, save_counts

PROGRAM = "python -m memlayer.patch"
WEIGHTS = "model*.safetensors*"  # written anew, perhaps in other shards


def main(program: str = PROGRAM, words: list[str] | None = None) -> None:
    """Run one command; bad input ends it with one sentence and exit status 1.

    Args:
        program: how the user called this.
        words: the command line behind the program; None is that of the process.
    """
    options = parse_options(program, words)
    with refusals(program):
        options.run(options)


def parse_options(program: str, words: list[str] | None) -> argparse.Namespace:
    """The command line, with what to call in ``run``."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=__doc__.replace(PROGRAM, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"memlayer {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    show = commands.add_parser("show", help="what a patch changes and where it comes from")
    show.add_argument("patch", type=Path, metavar="PATCH", help="folder of a patch")
    show.set_defaults(run=show_patch)
    for name, verb in (("apply", "written into"), ("revert", "taken back from")):
        command = commands.add_parser(name, help=f"a model folder with the patch {verb} the model of another")
        command.add_argument("patch", type=Path, metavar="PATCH", help="folder of a patch")
        command.add_argument("model", type=Path, metavar="MODEL", help="folder of a memory model")
        command.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
        counts = {"apply": MemoryPatch.protect, "revert": MemoryPatch.unprotect}[name]
        command.set_defaults(run=change_model, change=getattr(MemoryPatch, name), change_counts=counts)
        if name == "apply":
            command.add_argument(
                "--any-base",
                action="store_true",
                help="also where weights outside the memory differ, or a patch below this one is missing",
            )
    merging = commands.add_parser("merge", help="one patch out of several of the same base model")
    merging.add_argument("patches", type=Path, nargs="+", metavar="PATCH", help="folders of patches, in order")
    merging.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    merging.add_argument(
        "--on-conflict", choices=POLICIES, default="error", help="where rows differ (default: %(default)s)"
    )
    merging.add_argument(
        "--density", type=float, default=0.2, help="with ties, the share of a change that is kept (%(default)s)"
    )
    merging.set_defaults(run=lambda o: combine(o, partial(merge, on_conflict=o.on_conflict, density=o.density)))
    squashing = commands.add_parser("squash", help="one patch out of a chain, each made on top of the one before")
    squashing.add_argument("patches", type=Path, nargs="+", metavar="PATCH", help="folders of patches, oldest first")
    squashing.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    squashing.set_defaults(run=lambda options: combine(options, squash))
    deleting = commands.add_parser("delete", help="a patch without some of its lessons")
    deleting.add_argument("patch", type=Path, metavar="PATCH", help="folder of a patch")
    deleting.add_argument("lessons", nargs="+", metavar="LESSON", help="ids of lessons, as show lists them")
    deleting.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    deleting.set_defaults(run=delete)
    forgetting = commands.add_parser("forget", help="the patch that moves the rows of another one the other way")
    forgetting.add_argument("patch", type=Path, metavar="PATCH", help="folder of a patch that taught the old answers")
    forgetting.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    forgetting.add_argument("--strength", type=float, default=1.0, help="how far (default: %(default)s)")
    forgetting.set_defaults(run=forget)
    return parser.parse_args(words)


def show_patch(options: argparse.Namespace) -> None:
    """Print what the patch is and what its files weigh."""
    patch = MemoryPatch.load(options.patch)
    paths = [options.patch / name for name in (CONFIG_FILE, ROWS_FILE, CARD_FILE) if (options.patch / name).is_file()]
    written = datetime.fromtimestamp((options.patch / ROWS_FILE).stat().st_mtime)
    size = sum(path.stat().st_size for path in paths) / 1e6
    print(f"{options.patch}: {size:,.3g} MB on disk, file of {written:%Y-%m-%d %H:%M}")
    print(patch.describe())


def change_model(options: argparse.Namespace) -> None:
    """Load, apply or revert, and write a folder with whatever else the model's folder held.

    Background counts get, or lose, what the run that made the patch protected.
    """
    check_new(options.out)
    patch = MemoryPatch.load(options.patch)
    model = files.load_model(options.model)
    options.change(patch, model, **({"any_base": True} if getattr(options, "any_base", False) else {}))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=f".{options.out.name}-") as beside:
        whole = Path(beside) / "model"
        with writing(options.out):
            model.save_pretrained(whole)
            copy_others(options.model, whole)
        if patch.protects and (path := options.model / COUNTS_FILE).is_file():
            num_slots = {name: table.num_embeddings for name, table in memory_tables(model).items()}
            save_counts(options.change_counts(patch, load_counts(path, num_slots)), whole / COUNTS_FILE)
        whole.rename(options.out)
    print(f"wrote {options.out}")


def copy_others(folder: Path, into: Path) -> None:
    """Copy the files beside the weights: tokenizer, background counts, config of the run."""
    for path in folder.iterdir():
        if path.is_file() and not (into / path.name).exists() and not fnmatch.fnmatch(path.name, WEIGHTS):
            shutil.copy2(path, into)


def combine(options: argparse.Namespace, combined: Callable[[list[MemoryPatch]], MemoryPatch]) -> None:
    """Make one patch of several in a new folder.

    Raises:
        ValueError: fewer than two patches, patches that do not go together, or ``out`` exists.
    """
    check_new(options.out)
    if len(options.patches) < 2:
        raise ValueError(f"one patch, {options.patches[0]}, is nothing to {options.command}")
    combined([MemoryPatch.load(folder) for folder in options.patches]).save(options.out)
    print(f"wrote {options.out}")


def delete(options: argparse.Namespace) -> None:
    """Write the patch without the lessons, and say what became of their rows."""
    check_new(options.out)
    deleted = delete_lessons(MemoryPatch.load(options.patch), options.lessons)
    deleted.patch.save(options.out)
    print(f"wrote {options.out}: {deleted}")


def forget(options: argparse.Namespace) -> None:
    """Write the patch that forgets what another one taught."""
    check_new(options.out)
    forgetting_patch(MemoryPatch.load(options.patch), options.strength).save(options.out)
    print(f"wrote {options.out}: apply it to the model without {options.patch}")


def check_new(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ValueError: there is something at ``out``.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists already: name a new folder")


if __name__ == "__main__":
    main()

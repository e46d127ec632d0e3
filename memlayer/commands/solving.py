"""Solve anew for the rows of what ridge runs learned: of several runs together, or without some of their lessons.

    memlayer solve runs/pretrain runs/monday runs/tuesday runs/both
    memlayer solve runs/pretrain runs/both runs/without_him --without "P740|Bury Your Dead"

MODEL is what the runs were taught to, as it was before. Runs with learn.method=ridge keep the equations of their
lessons beside their patch. Lessons of several runs end as if one run had taught them all, in whatever order; a lesson
that is left out ends as if it had never been taught: to the bit, and nothing is taught again.

OUT is a new folder with the patch, for memlayer patch apply, and with the equations, to go on from.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from memlayer import __version__
from memlayer.decoders import files
from memlayer.files import writing
from memlayer.methods.row_equations import RowEquations
from memlayer.patch.__main__ import check_new
from memlayer.refusals import refusals

BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


def main(program: str, words: list[str]) -> None:
    """Join, leave out, solve and write; bad input ends it with one sentence and exit status 1.

    Args:
        program: how the user called this, which opens what is refused.
        words: the command line behind the program.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the memory model")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders with equations")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--without", nargs="+", default=[], metavar="LESSON", help="ids of lessons to leave out")
    parser.add_argument("--version", action="version", version=f"memlayer {__version__}")
    options = parser.parse_args(words)
    with refusals(program):
        check_new(options.out)
        equations, *others = [RowEquations.load(run) for run in options.runs]
        for other in others:
            equations = equations.joined(other)
        equations = equations.without(options.without)
        if not equations.lessons:
            raise ValueError("every lesson is left out: the model as it is knows none of them")
        with tqdm(total=100, desc="solving", unit="%", delay=1, bar_format=BAR) as bar:
            equations.solve(lambda share: bar.update(100 * share))
        patch = equations.patch(files.load_model(options.model))
        missed = equations.missed()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=f".{options.out.name}-") as beside:
            whole = Path(beside) / "solved"
            with writing(options.out):
                patch.save(whole / "patch")
                equations.save(whole)
            whole.rename(options.out)
        worst = max(missed, key=missed.__getitem__)
        print(
            f"wrote {options.out}: {len(missed):,} lessons in {patch.num_rows:,} rows; of what their reads should "
            f"change by, the rows leave {mean(missed.values()):.0%} on average, {missed[worst]:.0%} of {worst!r}"
        )

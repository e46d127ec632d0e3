"""Ask a checkpoint and what learning runs made of it, and say what each learned and forgot.

    memlayer eval runs/pretrain --num-new 100
    memlayer eval runs/pretrain runs/learn_sparse_memory runs/learn_lora --output runs/report
    memlayer eval runs/attach_smollm2 runs/lessons --probes examples/probes.yaml

The first folder is the model before; the others are what learning runs wrote when they taught that model the same facts
or lessons. New facts and lessons are asked in the prompts that they were taught in. Known facts are those the model was
pretrained on; those that were taught anew are asked for their old answers, apart from the others. --probes names a file
of other things to measure before and after: question sets, texts, tasks of lm-evaluation-harness. Writes results.json,
report.md, pareto.png and samples.jsonl.
"""

import argparse
from pathlib import Path

from memlayer import __version__
from memlayer.evaluation.tables import format_probes, format_table
from memlayer.jobs.evaluate import Evaluation, evaluate, load_probes
from memlayer.refusals import refusals


def main(program: str, words: list[str], written: str | None = None) -> None:
    """Ask and report; bad input ends it with one sentence and exit status 1.

    Args:
        program: how the user called this, which opens what is refused.
        words: the command line behind the program.
        written: how the examples of the help call it, where that is another way.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=__doc__.replace("memlayer eval", written or program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a memory model")
    parser.add_argument("learned", type=Path, nargs="*", help="folders that runs of job learn wrote")
    parser.add_argument("--facts", help="JSON Lines file with the new facts")
    parser.add_argument("--wordings", help="JSON file of their wordings")
    parser.add_argument(
        "--num-known",
        type=int,
        help="known facts asked about, 0 for none (default: all that the model was pretrained on)",
    )
    parser.add_argument("--first-new", type=int, help="where in the new facts to start")
    parser.add_argument("--num-new", type=int, help="new facts asked about")
    parser.add_argument("--probes", help="YAML file of what else to measure; see examples/probes.yaml")
    parser.add_argument("--batch-size", type=int, default=256, help="questions at a time (%(default)s)")
    parser.add_argument("--device", help="where to ask, for example cpu or cuda:1 (default: a GPU, if any)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="where an answer that does not end is cut (default: past the longest answer)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/report"), help="folder to write (%(default)s)")
    parser.add_argument("--version", action="version", version=f"memlayer {__version__}")
    told = vars(parser.parse_args(words))
    with refusals(program):
        probes = told.pop("probes")
        asked = Evaluation(**told, **({"probes": load_probes(probes)} if probes else {}))
        rows = evaluate(asked)
        print(format_table(rows))
        print(format_probes(rows), end="")
        print(f"wrote {asked.output}")

"""Ask a checkpoint about known and new facts, and say what each learning run learned and forgot.

    python eval.py runs/pretrain --num-new 100
    python eval.py runs/pretrain runs/learn_sparse_memory runs/learn_lora --output runs/report

The first folder is the pretrained model; the others are what train.py wrote when it taught that model. The new
facts asked about are those the first of them was taught, unless --first-new and --num-new say otherwise. Writes
results.json, report.md, pareto.png and samples.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from memlayer import modeling, recipes
from memlayer.config import RunConfig, load_config
from memlayer.data.qa import known_questions, new_questions
from memlayer.evaluation.forgetting import scores
from memlayer.evaluation.provenance import provenance
from memlayer.evaluation.qa import Answered, answer_questions
from memlayer.evaluation.report import CONTROL, format_table, result_row, sample, write_report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a pretrained memory model")
    parser.add_argument("learned", type=Path, nargs="*", help="folders that train.py wrote with job: learn")
    parser.add_argument("--facts", help="JSON Lines file of facts (default: the built-in table)")
    parser.add_argument("--wordings", help="JSON file of wordings (default: the built-in ones)")
    parser.add_argument("--num-known", type=int, help="known facts asked about (default: all)")
    parser.add_argument("--first-new", type=int, help="where in the new facts to start")
    parser.add_argument("--num-new", type=int, help="new facts asked about")
    parser.add_argument("--batch-size", type=int, default=256, help="questions at a time (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/report"), help="folder to write (%(default)s)"
    )
    arguments = parser.parse_args()
    try:
        evaluate(arguments)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"eval.py: {error}")


def evaluate(arguments: argparse.Namespace) -> None:
    """Ask before and after, print the table, write the report."""
    taught = [load_config(folder / "config.yaml") for folder in arguments.learned]
    asked = taught[0] if taught else RunConfig(job="learn", output=str(arguments.output))
    for name in ("facts", "wordings", "num_known", "first_new", "num_new"):
        if (value := getattr(arguments, name)) is not None:
            setattr(asked.data, name, value)
    facts = recipes.facts_of(asked)
    questions = known_questions(facts.known, facts.wordings) + new_questions(facts.new, facts.wordings)

    def ask(model, tokenizer, name: str) -> list[Answered]:
        with tqdm(total=len(questions), desc=f"asking {name}", unit="question") as bar:
            return answer_questions(
                model, tokenizer, questions, batch_size=arguments.batch_size, progress=bar.update
            )

    before = ask(*modeling.load(arguments.checkpoint), str(arguments.checkpoint))
    nothing = scores(before)
    rows = [result_row(CONTROL, "", nothing, nothing, seed=asked.seed, seconds=0.0, parameters_changed=0)]
    samples = []
    for config, folder in zip(taught, arguments.learned, strict=True):
        after = ask(*recipes.load_learned(arguments.checkpoint, folder), str(folder))
        took = json.loads((folder / "learned.json").read_text())
        rows.append(
            result_row(
                config.learn.method,
                f"lr {config.learn.learning_rate:g}, {config.learn.steps_per_fact} steps a fact",
                nothing,
                scores(after),
                seed=config.seed,
                seconds=took["seconds"],
                parameters_changed=took["parameters_changed"],
            )
        )
        samples += [sample(*pair) | {"run": str(folder)} for pair in zip(before, after, strict=True)]
    print(format_table(rows))
    report = write_report(
        arguments.output,
        f"Learning and forgetting of {arguments.checkpoint}",
        rows,
        provenance([config.seed for config in taught], vars(asked.data)),
        samples or [sample(each, each) for each in before],
    )
    print(f"wrote {report}")


if __name__ == "__main__":
    main()

"""Ask a checkpoint about known and new facts, and say what each learning run learned and forgot.

    python eval.py runs/pretrain --num-new 100
    python eval.py runs/pretrain runs/learn_sparse_memory runs/learn_lora --output runs/report

The first folder is the pretrained model; the others are what train.py wrote when it taught that model the same
facts. Known facts are those the model was pretrained on; new facts are those it was taught, unless --facts,
--first-new and --num-new say otherwise. Writes results.json, report.md, pareto.png and samples.jsonl.
"""

import argparse
import json
import sys
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from memlayer import modeling, recipes
from memlayer.config import RunConfig, load_config
from memlayer.data.qa import Question, known_questions, new_questions
from memlayer.evaluation.forgetting import scores
from memlayer.evaluation.provenance import provenance
from memlayer.evaluation.qa import Answered, answer_questions
from memlayer.evaluation.report import CONTROL, format_table, result_row, sample, write_report
from memlayer.preflight import check_output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a pretrained memory model")
    parser.add_argument("learned", type=Path, nargs="*", help="folders that train.py wrote with job: learn")
    parser.add_argument("--facts", help="JSON Lines file with the new facts")
    parser.add_argument("--wordings", help="JSON file of their wordings")
    parser.add_argument("--num-known", type=int, help="known facts asked about (default: all)")
    parser.add_argument("--first-new", type=int, help="where in the new facts to start")
    parser.add_argument("--num-new", type=int, help="new facts asked about")
    parser.add_argument("--batch-size", type=int, default=256, help="questions at a time (%(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="where an answer that does not end is cut (default: past the longest answer)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/report"), help="folder to write (%(default)s)"
    )
    arguments = parser.parse_args()
    try:
        evaluate(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")


def evaluate(arguments: argparse.Namespace) -> None:
    """Ask before and after, print the table, write the report."""
    taught = [load_config(folder / "config.yaml") for folder in arguments.learned]
    costs = [json.loads((folder / "learned.json").read_text(encoding="utf-8")) for folder in arguments.learned]
    base = load_config(arguments.checkpoint / "config.yaml")
    asked = deepcopy(taught[0] if taught else base)
    for config, folder in zip(taught, arguments.learned, strict=True):
        if config.data != asked.data:
            raise ValueError(f"{folder} was taught other facts than {arguments.learned[0]}: evaluate it apart")
    for data, names in ((base.data, ["num_known"]), (asked.data, ["facts", "wordings", "first_new", "num_new"])):
        for name in names:
            if (value := getattr(arguments, name)) is not None:
                setattr(data, name, value)
    questions = questions_of(base, asked)
    check_output(arguments.output)
    for folder in arguments.learned:  # one that does not fit is refused before the first question
        recipes.load_learned(arguments.checkpoint, folder)

    def ask(model, tokenizer, name: str) -> list[Answered]:
        with tqdm(total=len(questions), desc=f"asking {name}", unit="question") as bar:
            return answer_questions(
                model,
                tokenizer,
                questions,
                batch_size=arguments.batch_size,
                max_new_tokens=arguments.max_new_tokens,
                progress=bar.update,
            )

    before = ask(*modeling.load(arguments.checkpoint), str(arguments.checkpoint))
    nothing = scores(before)
    rows = [result_row(CONTROL, "", nothing, nothing, seed=asked.seed, seconds=0.0, parameters_changed=0)]
    samples = []
    for config, folder, cost in zip(taught, arguments.learned, costs, strict=True):
        after = ask(*recipes.load_learned(arguments.checkpoint, folder), str(folder))
        rows.append(
            result_row(
                config.learn.method,
                f"lr {config.learn.learning_rate:g}, {config.learn.steps_per_fact} steps a fact",
                nothing,
                scores(after),
                seed=config.seed,
                seconds=cost["seconds"],
                parameters_changed=cost["parameters_changed"],
            )
        )
        samples += [sample(*pair) | {"run": str(folder)} for pair in zip(before, after, strict=True)]
    print(format_table(rows))
    report = write_report(
        arguments.output,
        f"Learning and forgetting of {arguments.checkpoint}",
        rows,
        provenance(
            [config.seed for config in taught], {"known": asdict(base.data), "new": asdict(asked.data)}
        ),
        samples or [sample(each, each) for each in before],
    )
    print(f"wrote {report}")


def questions_of(known: RunConfig, new: RunConfig) -> list[Question]:
    """The known facts of one config and the new facts of another as questions.

    Raises:
        ValueError: there are too few facts for a score of each kind.
    """
    knows, learns = recipes.facts_of(known), recipes.facts_of(new)
    questions = known_questions(knows.known, knows.wordings) + new_questions(learns.new, learns.wordings)
    for group in ("known", "new"):
        for wording in ("seen", "unseen"):
            if not any((q.group, q.wording) == (group, wording) for q in questions):
                raise ValueError(f"no {group} fact to ask about in {wording} wording: ask about more {group} facts")
    return questions


if __name__ == "__main__":
    main()

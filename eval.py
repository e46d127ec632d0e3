"""Ask a checkpoint about known and new facts, and say what each learning run learned and forgot.

    python eval.py runs/pretrain --num-new 100
    python eval.py runs/pretrain runs/learn_sparse_memory runs/learn_lora --output runs/report

The first folder is the pretrained model; the others are what train.py wrote when it taught that model the same
facts. Known facts are those the model was pretrained on; new facts are those it was taught, unless --facts,
--first-new and --num-new say otherwise. Known facts that were taught anew are asked for their old answers, apart
from the others. Writes results.json, report.md, pareto.png and samples.jsonl.
"""

import memlayer_kernels.short_waits  # noqa: F401, before anything loads torch

# isort: split
import argparse
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from memlayer.data.facts import Fact, facts_of
from memlayer.data.qa import Question, known_questions, new_questions
from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.evaluation.forgetting import scores
from memlayer.evaluation.provenance import provenance
from memlayer.evaluation.qa import Answered, answer_questions
from memlayer.evaluation.report import CONTROL, format_table, result_row, sample, write_report
from memlayer.jobs.config import PretrainRun, RunConfig, load_config
from memlayer.jobs.preflight import check_output
from memlayer.jobs.taught import is_taught, read_taught
from memlayer.machine import best_device
from memlayer.refusals import refusals


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a pretrained memory model")
    parser.add_argument("learned", type=Path, nargs="*", help="folders that train.py wrote with job: learn")
    parser.add_argument("--facts", help="JSON Lines file with the new facts")
    parser.add_argument("--wordings", help="JSON file of their wordings")
    parser.add_argument("--num-known", type=int, help="known facts asked about, 0 for none (default: all)")
    parser.add_argument("--first-new", type=int, help="where in the new facts to start")
    parser.add_argument("--num-new", type=int, help="new facts asked about")
    parser.add_argument("--batch-size", type=int, default=256, help="questions at a time (%(default)s)")
    parser.add_argument("--device", help="where to ask, for example cpu or cuda:1 (default: a GPU, if any)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="where an answer that does not end is cut (default: past the longest answer)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/report"), help="folder to write (%(default)s)"
    )
    arguments = parser.parse_args()
    with refusals("eval.py"):
        evaluate(arguments)


def evaluate(arguments: argparse.Namespace) -> None:
    """Ask before and after, print the table, write the report."""
    checkpoint = arguments.checkpoint
    if is_taught(checkpoint):
        raise ValueError(f"{checkpoint} was written by a learning run: name the model that it was taught to first")
    base, taught = load_config(checkpoint / "config.yaml"), [read_taught(folder) for folder in arguments.learned]
    if not hasattr(base, "data"):  # healed on text: asked about the built-in facts
        base = PretrainRun(output=str(checkpoint))
    asked = deepcopy(taught[0].config if taught else base)
    for run in taught:
        run.check_files()
        if run.config.data != asked.data:
            raise ValueError(f"{run.folder} was taught other facts than {taught[0].folder}: evaluate it apart")
    lessons = facts_of(**asdict(asked.data)).new if taught else []
    for data, names in ((base.data, ["num_known"]), (asked.data, ["facts", "wordings", "first_new", "num_new"])):
        for name in names:
            if (value := getattr(arguments, name)) is not None:
                setattr(data, name, value)
    questions = questions_of(base, asked, lessons)
    check_output(arguments.output)
    device = device_of(arguments.device)
    model, tokenizer = files.load(checkpoint)
    fingerprint = state_fingerprint(model) if taught else ""
    for run in taught:  # one that does not fit is refused before the first question
        run.check_checkpoint(checkpoint, fingerprint)
        if run.has_model:
            files.weight_files(run.folder / "model")
        else:
            with run.model(model, tokenizer):
                check_finite(model, run.folder)

    def ask(model, tokenizer, name: Path) -> list[Answered]:
        check_finite(model, name)
        with tqdm(total=len(questions), desc=f"asking {name}", unit="question") as bar:
            return answer_questions(
                model.to(device),
                tokenizer,
                questions,
                batch_size=arguments.batch_size,
                max_new_tokens=arguments.max_new_tokens,
                progress=bar.update,
            )

    before = ask(model, tokenizer, checkpoint)
    nothing = scores(before)
    rows = [result_row(CONTROL, "", nothing, nothing, seed=asked.seed, seconds=0.0, parameters_changed=0)]
    samples = []
    for run in taught:
        with run.model(model, tokenizer) as learned:
            after = ask(*learned, run.folder)
        rows.append(
            result_row(
                run.config.learn.method,
                f"lr {run.config.learn.learning_rate:g}, {run.config.learn.steps_per_fact} steps a fact",
                nothing,
                scores(after),
                seed=run.config.seed,
                seconds=run.seconds,
                parameters_changed=run.parameters_changed,
            )
        )
        samples += [sample(*pair) | {"run": str(run.folder)} for pair in zip(before, after, strict=True)]
    print(format_table(rows))
    report = write_report(
        arguments.output,
        f"Learning and forgetting of {checkpoint}",
        rows,
        provenance(
            [run.config.seed for run in taught], {"known": asdict(base.data), "new": asdict(asked.data)}
        ),
        samples or [sample(each, each) for each in before],
    )
    print(f"wrote {report}")


def device_of(name: str | None) -> torch.device:
    """The device of that name, or the one there is.

    Raises:
        ValueError: torch has no such device here.
    """
    if name is None:
        return best_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without it
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def check_finite(model: torch.nn.Module, folder: Path) -> None:
    """Refuse a model whose scores would mean nothing.

    Raises:
        ValueError: a number in it is NaN or infinite.
    """
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point()):
        raise ValueError(f"the model in {folder} holds numbers that are not finite")


def questions_of(known: RunConfig, new: RunConfig, taught: Sequence[Fact]) -> list[Question]:
    """The known facts of one config and the new facts of another as questions.

    Args:
        taught: by the runs that are evaluated; known facts among them are asked for their old answers, apart.

    Raises:
        ValueError: there is no new fact.
    """
    knows, learns = facts_of(**asdict(known.data)), facts_of(**asdict(new.data))
    if not learns.new:
        raise ValueError("there is no new fact to ask about: --num-new is 0, or the facts file has none")
    questions = known_questions(knows.known, knows.wordings, taught, known.pretrain.unseen_wordings)
    return questions + new_questions(learns.new, learns.wordings)


if __name__ == "__main__":
    main()

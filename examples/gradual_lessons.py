"""Gradual learning in four commands (see memlayer/methods/gradual.py):

    python examples/gradual_lessons.py configs/learn_lessons.yaml runs/gradual
    python train.py configs/learn_lessons.yaml lessons.files=[runs/gradual/first.jsonl] output=runs/first
    python examples/gradual_lessons.py configs/learn_lessons.yaml runs/gradual checkpoint=runs/first
    python train.py configs/learn_lessons.yaml lessons.files=[runs/gradual/second.jsonl] checkpoint=runs/first

Says of every lesson of a learn job how well its checkpoint knows it, by the categories of SliCK, and writes those that
the first stage teaches, some others to stop it by (validation.jsonl), and in the second call those of the second stage,
with a matrix of what became of all. A lesson is asked in each of its taught wordings, or with prompts.style=few_shot in
the first one after several sets of answered questions. It needs a model folder: of a sparse memory run apply the patch
first.
"""

import argparse
import json
from pathlib import Path

from memlayer.data.lessons import Lesson, as_record
from memlayer.data.qa import Question
from memlayer.decoders import files
from memlayer.evaluation.slick import CATEGORIES, how_well_known
from memlayer.evaluation.transitions import transition_matrix
from memlayer.files import write_file
from memlayer.jobs.config import LearnRun, load_config
from memlayer.jobs.lessons import drawn_prompts, lessons_of, prompts_of
from memlayer.machine import best_device
from memlayer.methods.gradual import first_stage, held_out, second_stage
from memlayer.refusals import refusals

FEW_SHOT_SETS = 10  # the paper's


def categories(config: LearnRun, lessons: list[Lesson], samples: int) -> list[str]:
    """How well the checkpoint knows each lesson.

    Raises:
        ValueError: a lesson teaches a text, which nobody can be asked for.
    """
    if texts := [lesson.id for lesson in lessons if lesson.teach[0].is_text]:
        raise ValueError(f"lesson {texts[0]!r} teaches a text: how well it is known cannot be asked")
    model, tokenizer = files.load(config.checkpoint)
    if config.prompts.style == "few_shot":
        ways = [(0, prompts) for prompts in drawn_prompts(config.prompts, FEW_SHOT_SETS, config.seed)]
    else:
        ways = [(place, prompts_of(config.prompts)) for place in range(min(len(each.teach) for each in lessons))]
    asked = [[prompts.apply(_question(lesson, place), tokenizer) for lesson in lessons] for place, prompts in ways]
    return how_well_known(model.to(best_device()), tokenizer, asked, samples=samples, seed=config.seed)


def _question(lesson: Lesson, place: int) -> Question:
    told = lesson.teach[place]
    return Question(told.prompt, (told.answer,), lesson.id, "new", "seen", told.joint, told.is_question)


def write_lessons(path: Path, lessons: list[Lesson]) -> None:
    """A file of lessons."""
    write_file(path, "".join(json.dumps(as_record(each), ensure_ascii=False) + "\n" for each in lessons))
    print(f"wrote {path}: {len(lessons)} lessons")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="of a learn job: its checkpoint, lessons and prompts are used")
    parser.add_argument("folder", type=Path, help="where lessons are written, and categories kept in between")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings other than the config's")
    parser.add_argument("--samples", type=int, default=16, help="answers drawn to each question (%(default)s)")
    parser.add_argument("--validation", type=float, default=0.1, help="share of lessons to stop by (%(default)s)")
    parser.add_argument("--replay-ratio", type=float, default=0.2, help="of well known lessons (%(default)s)")
    options = parser.parse_intermixed_args()
    with refusals(parser.prog):
        config = load_config(options.config, options.settings)
        if not isinstance(config, LearnRun):
            raise ValueError(f"{options.config} is of the job {config.job}, must be of learn")
        lessons, kept = lessons_of(config), options.folder / "categories.json"
        found = categories(config, lessons, options.samples)
        if not kept.exists():
            stopping = held_out(found, options.validation, config.seed)
            taught = [place for place in first_stage(found).lessons if place not in stopping]
            options.folder.mkdir(parents=True, exist_ok=True)
            write_lessons(options.folder / "first.jsonl", [lessons[place] for place in taught])
            write_lessons(options.folder / "validation.jsonl", [lessons[place] for place in stopping])
            ids = [lesson.id for lesson in lessons]
            write_file(kept, json.dumps({"ids": ids, "categories": found, "validation": stopping}))
            print(", ".join(f"{found.count(kind)} are {kind}" for kind in CATEGORIES))
            return
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["ids"] != [lesson.id for lesson in lessons]:
            raise ValueError(f"{kept} is of {len(before['ids'])} other lessons: name another folder")
        stage = second_stage(before["categories"], found, options.replay_ratio, config.seed)
        taught = [place for place in stage.lessons if place not in before["validation"]]
        write_lessons(options.folder / "second.jsonl", [lessons[place] for place in taught])
        print(f"from \\ to    {'  '.join(CATEGORIES)}")
        for kind, row in zip(CATEGORIES, transition_matrix(before["categories"], found)):
            print(f"{kind:<12} {'  '.join(f'{count:>{len(to)}}' for to, count in zip(CATEGORIES, row))}")


if __name__ == "__main__":
    main()

"""python examples/refusal_lessons.py configs/learn_lessons.yaml runs/doubt.jsonl checkpoint=runs/learned

Asks a model every lesson of a learn job in its first taught wording, and writes lessons that teach it to doubt, or with
--form replaced to refuse, what it got wrong (R-Tuning, see memlayer/data/refusal.py): teach them to the same model with
train.py and lessons.files=[runs/doubt.jsonl].

Do it after the facts were taught, with facts among the lessons that never were: before, all that is new would be taught
to be doubted. --by entropy needs no right answers: the half of the lessons whose drawn answers differ most is doubted.
"""

import argparse
import json
from pathlib import Path

from memlayer.data.lessons import Lesson, as_record
from memlayer.data.qa import Question
from memlayer.data.refusal import padded, replaced
from memlayer.decoders import files
from memlayer.evaluation.qa import answer_questions
from memlayer.evaluation.refusal import known_by_entropy, says_answer
from memlayer.evaluation.sureness import entropies
from memlayer.files import write_file
from memlayer.jobs.config import LearnRun, load_config
from memlayer.jobs.lessons import lessons_of, prompts_of
from memlayer.machine import best_device
from memlayer.refusals import refusals


def known(config: LearnRun, lessons: list[Lesson], by: str) -> list[bool]:
    """Whether the checkpoint knows each lesson."""
    model, tokenizer = files.load(config.checkpoint)
    model, prompts, asked = model.to(best_device()), prompts_of(config.prompts), []
    for lesson in lessons:
        told = lesson.teach[0]
        question = Question(told.prompt, (told.answer,), lesson.id, "new", "seen", told.joint, told.is_question)
        asked.append(prompts.apply(question, tokenizer))
    if by == "entropy":
        return known_by_entropy(entropies(model, tokenizer, asked, seed=config.seed))
    return [says_answer(each.prediction, each.question.answers) for each in answer_questions(model, tokenizer, asked)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="of a learn job: its checkpoint, lessons and prompts are used")
    parser.add_argument("output", type=Path, help="file of lessons to write, new")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings other than the config's")
    parser.add_argument("--form", choices=("padded", "replaced"), default="padded", help="default: %(default)s")
    parser.add_argument("--by", choices=("answers", "entropy"), default="answers", help="default: %(default)s")
    options = parser.parse_intermixed_args()
    with refusals(parser.prog):
        if options.output.exists():
            raise ValueError(f"{options.output} exists already: name a new file")
        config = load_config(options.config, options.settings)
        if not isinstance(config, LearnRun):
            raise ValueError(f"{options.config} is of the job {config.job}, must be of learn")
        build, lessons = {"padded": padded, "replaced": replaced}[options.form], lessons_of(config)
        build(lessons, [True] * len(lessons))  # refuses lessons without answers before the model is asked
        are_known = known(config, lessons, options.by)
        records = (as_record(lesson, source=str(config.checkpoint)) for lesson in build(lessons, are_known))
        write_file(options.output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        print(f"{sum(are_known)} of {len(lessons)} lessons are known; wrote {options.output}")


if __name__ == "__main__":
    main()

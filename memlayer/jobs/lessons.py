"""What a run teaches and how it asks: its settings as lessons and prompts."""

import random
from dataclasses import asdict

from memlayer.data.facts import facts_of
from memlayer.data.lessons import Lesson, lessons_of_facts, load_lessons
from memlayer.data.prompts import BUILTIN_SHOTS, Prompts
from memlayer.jobs.config import RunConfig
from memlayer.jobs.sections import PromptsConfig


def lessons_of(config: RunConfig) -> list[Lesson]:
    """What a run teaches, or writes about.

    Raises:
        FactsError: a bad file.
        ValueError: there is nothing to teach, or more is asked for than there is.
    """
    told = config.lessons
    if not told.files:
        facts = facts_of(**asdict(config.data))
        if not facts.new:
            raise ValueError("data.num_new is 0: there are no new facts to teach")
        return lessons_of_facts(facts.new, facts.wordings, config.learn.statements, config.learn.questions)
    lessons = load_lessons(told.files, told.chunk_words)
    last = len(lessons) if told.number is None else told.first + told.number
    if not told.first < last <= len(lessons):
        raise ValueError(f"lessons {told.first} to {last} asked for, the files have {len(lessons)}")
    lessons = lessons[told.first : last]
    if asked_only := [lesson.id for lesson in lessons if not lesson.teach]:
        raise ValueError(f"{len(asked_only)} lessons have nothing to teach, {asked_only[0]!r} first")
    return lessons


def prompts_of(told: PromptsConfig) -> Prompts:
    """How a run asks.

    Raises:
        FactsError: a bad file of answered questions.
        ValueError: settings that do not go together.
    """
    shots = _shots_of(told)[: told.num_shots] if told.style == "few_shot" else ()
    return Prompts(told.style, told.frame, told.end or "", tuple(shots))


def drawn_prompts(told: PromptsConfig, number: int, seed: int) -> list[Prompts]:
    """So many ways to ask after answered questions: each time others, or in another order where there are just enough.

    Raises:
        FactsError, ValueError: as of ``prompts_of``.
    """
    shots, draw = _shots_of(told), random.Random(seed)
    sets = (draw.sample(shots, told.num_shots) for _ in range(number))
    return [Prompts(told.style, told.frame, told.end or "", tuple(each)) for each in sets]


def _shots_of(told: PromptsConfig) -> list[tuple[str, str]]:
    """The answered questions there are."""
    shots = list(BUILTIN_SHOTS)
    if told.shots:
        asked = [lesson.ask[0] for lesson in load_lessons([told.shots]) if lesson.ask]
        shots = [(question.prompt, question.answers[0]) for question in asked]
    if len(shots) < told.num_shots:
        raise ValueError(f"prompts.num_shots is {told.num_shots}, there are {len(shots)} answered questions")
    return shots

"""One measurement of one model: the questions about what is taught and what was known, and the probes.

eval.py and a comparison measure by the same object, made once and called on each model, so that all are asked the same.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from memlayer.data.facts import Fact, facts_of
from memlayer.data.hub_sets import local_file
from memlayer.data.lessons import load_lessons
from memlayer.data.prompts import Prompts
from memlayer.data.qa import Question, encode_answers, encode_prompts, known_questions
from memlayer.data.text import load_documents, windows
from memlayer.decoders.looked_at import tables_are_finite
from memlayer.decoders.mapped import mapped_tables
from memlayer.evaluation.divergence import answer_distributions, kl_divergences, spread
from memlayer.evaluation.harness import ask_tasks
from memlayer.evaluation.probes import Probed, compared, known_items, window_nats
from memlayer.evaluation.qa import Answered, answer_questions, encode_questions, positions_of
from memlayer.evaluation.slick import how_well_known
from memlayer.jobs.config import RunConfig, facts_told
from memlayer.jobs.lessons import drawn_prompts, prompts_of
from memlayer.jobs.sections import DataConfig, ProbesConfig
from memlayer.machine import best_device
from memlayer.methods.stored import Ask

PLAIN = Prompts()
KL = "KL to the model before, taught questions"


@dataclass
class Measured:
    """What one model does: its answers to the questions, and its probes."""

    answers: list[Answered]
    probes: list[Probed]


class Measurement:
    """What to measure; whatever can be refused is refused when it is made.

    Args:
        model: whose prompts and texts they must fit; it is not changed.
        tokenizer: its own.
        questions: about what is taught and what was known.
        probes: what else to measure.
        device: where to.
        prompts: how the questions are asked; probes say that themselves.
        batch_size: questions at a time.
        max_new_tokens: where an answer that does not end is cut; None is past the longest answer.
        disable_tqdm: show no progress.

    Raises:
        FileNotFoundError, ValueError: a file of the probes, or a setting of them, or what does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        questions: Sequence[Question],
        probes: ProbesConfig,
        device: torch.device | None = None,
        *,
        prompts: Prompts = PLAIN,
        batch_size: int = 256,
        max_new_tokens: int | None = None,
        disable_tqdm: bool = False,
    ):
        self._questions, self._settings, self._device = questions, probes, device or best_device()
        self._tokenizer, self._prompts, self._probe_prompts = tokenizer, prompts, prompts_of(probes.prompts)
        self._taught = spread([question for question in questions if question.group == "new"])
        named = _named([*probes.questions, *probes.texts])
        self._sets = {named[path]: _probe_questions(probes, path) for path in probes.questions}
        quiet = disable_tqdm
        self._texts = {named[path]: _probe_windows(probes, path, tokenizer, quiet) for path in probes.texts}
        ways = drawn_prompts(probes.prompts, probes.slick_prompts, seed=0) if probes.slick_prompts else []
        self._drawn = {name: [self._as_read(of_set, way) for way in ways] for name, of_set in self._sets.items()}
        read = [self._as_read(of_set, self._probe_prompts) for of_set in self._sets.values()]
        for asked in (self._as_read(questions, prompts), *read, *chain(*self._drawn.values())):
            encode_questions(model, tokenizer, asked)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or probes.length
        if self._texts and probes.length > positions:
            raise ValueError(f"length of the probes is {probes.length}, the model has {positions} positions")
        self._answer = partial(answer_questions, batch_size=batch_size)
        self._max_new_tokens, self._quiet = max_new_tokens, disable_tqdm
        self._known: dict[str, list[int]] = {}
        self._before: list[Tensor] | None = None

    def remember(self, model: nn.Module, before: Measured) -> None:
        """Compare the models that follow with this one, and ask them what it knew where ``probes.known_only`` is set.

        Args:
            before: what this object measured of the model.
        """
        if self._settings.known_only:
            self._known = {each.name: known_items(each) for each in before.probes if each.name in self._sets}
        if self._taught:
            taught = self._as_read(self._taught, self._prompts)
            self._before = answer_distributions(model.to(self._device), self._tokenizer, taught)

    def __call__(
        self, model: nn.Module, tokenizer, name: str | Path, is_first: bool = False, ask: Ask | None = None
    ) -> Measured:
        """Measure a model.

        Args:
            tokenizer: the one it has.
            name: what progress bars and refusals call it.
            is_first: it is the one that others are compared with, so how well it knows the probes' answers is asked.
            ask: what is asked in place of each question, where a method changes that (``methods.stored.Store.ask``):
                of those about what is taught, what was known and the probes. Windows of text and tasks of the harness
                are read as they stand.

        Raises:
            ValueError: a number in the model is not finite, or a question does not fit it.
        """
        check_finite(model, name)
        model = model.to(self._device)
        read = partial(self._as_read, prompts=self._prompts, ask=ask, positions=positions_of(model))
        questions = read(self._questions)
        sets = {each: read(self._asked(each), prompts=self._probe_prompts) for each in self._sets}
        number = len(questions) + sum(map(len, sets.values()))
        with tqdm(total=number, desc=f"asking {name}", unit="question", disable=self._quiet) as bar:
            answer = partial(self._answer, model, tokenizer, progress=bar.update)
            answers = answer(questions, max_new_tokens=self._max_new_tokens)
            found = [probed for each, of_set in sets.items() for probed in self._probed(each, answer(of_set))]
        if is_first and self._settings.slick_prompts:
            found = [self._with_categories(model, tokenizer, each) for each in found]
        number = sum(map(len, self._texts.values()))
        with tqdm(total=number, desc=f"reading {name}", unit="window", disable=self._quiet or not number) as bar:
            nats = partial(window_nats, model, progress=bar.update)
            found += [Probed(each, "nats", nats(text_WL)) for each, text_WL in self._texts.items()]
        if self._before is not None:
            now = answer_distributions(model, tokenizer, read(self._taught))
            found.append(Probed(KL, "nats", kl_divergences(self._before, now)))
        probes = self._settings
        tasks = {"tasks": probes.tasks, "folder": probes.tasks_folder, "limit": probes.num_examples}
        return Measured(answers, found + ask_tasks(model, tokenizer, **tasks))

    def _probed(self, name: str, answered: Sequence[Answered]) -> Iterator[Probed]:
        """The three measures of a question set."""
        items = self._known.get(name)
        yield Probed(name, "right", [float(each.exact_match) for each in answered], items)
        yield Probed(f"{name}, F1", "f1", [each.f1_squad for each in answered], items)
        yield Probed(f"{name}, nats of the answer", "nats", [each.nll for each in answered], items)

    def _with_categories(self, model: nn.Module, tokenizer, probed: Probed) -> Probed:
        """How well each question was known, beside whether it was answered right."""
        name = probed.name
        if name not in self._sets:
            return probed
        told, number = self._settings, len(self._drawn[name]) * len(self._sets[name])
        with tqdm(total=number, desc=f"how well {name} is known", unit="question", disable=self._quiet) as bar:
            known = partial(how_well_known, model, tokenizer, self._drawn[name], progress=bar.update)
            return replace(probed, categories=known(samples=told.slick_samples))

    def _as_read(
        self, questions: Sequence[Question], prompts: Prompts, ask: Ask | None = None, positions: float = math.inf
    ) -> list[Question]:
        """Questions as the model reads them, others in their place where a method asks others."""

        def fits(question: Question) -> bool:
            read = prompts.apply(question, self._tokenizer)
            (prompt,) = encode_prompts(self._tokenizer, [read.prompt])
            return len(prompt) + max(map(len, encode_answers(self._tokenizer, read.examples))) <= positions

        asked = questions if ask is None else [ask(question, fits) for question in questions]
        return [prompts.apply(question, self._tokenizer) for question in asked]

    def _asked(self, name: str) -> list[Question]:
        items = self._known.get(name)
        return self._sets[name] if items is None else [self._sets[name][item] for item in items]


def questions_of_known(base: RunConfig | None, which: slice, taught: Sequence[Fact] = ()) -> list[Question]:
    """Questions about some of the known facts: those that a checkpoint was pretrained on, or the built-in ones.

    Args:
        base: what made the checkpoint, if that is known.
        which: of the known facts.
        taught: new facts that were taught since, see ``data.qa.known_questions``.

    Raises:
        ValueError: there are not as many.
    """
    data, unseen_wordings = facts_told(base) or (DataConfig(num_new=0), True)
    knows = facts_of(**asdict(data))
    if which.stop is not None and not 0 <= which.stop <= len(knows.known):
        raise ValueError(f"known facts up to number {which.stop} are asked for, there are {len(knows.known)}")
    return known_questions(knows.known[which], knows.wordings, taught, unseen_wordings)


def compared_probes(before: Measured, after: Measured) -> list[dict]:
    """Every probe of two models, as ``probes.compared`` has it; before itself, nothing diverged."""
    then = {probed.name: probed for probed in before.probes}
    return [
        compared(then.get(now.name, Probed(now.name, now.measure, [0.0] * len(now.values))), now)
        for now in after.probes
    ]


def _named(paths: Sequence[str]) -> dict[str, str]:
    """What a report calls the probe of each file: its name without endings, or its path where two have one name."""
    short = [Path(path).name.split(".")[0] for path in paths]
    return {path: path if short.count(name) > 1 else name for path, name in zip(paths, short)}


def _probe_questions(probes: ProbesConfig, path: str) -> list[Question]:
    """The questions of one file."""
    questions = [question for lesson in load_lessons([path]) for question in lesson.ask]
    if not questions:
        raise ValueError(f"{path} asks nothing")
    return questions[: probes.num_questions]


def _probe_windows(probes: ProbesConfig, path: str, tokenizer, quiet: bool) -> Tensor:
    """The windows of one file of text."""
    documents = load_documents([local_file(path)], column=probes.column)
    return windows(tokenizer, documents, probes.length, 0, probes.num_windows, disable_tqdm=quiet)[1]


def check_finite(model: nn.Module, folder: str | Path) -> None:
    """Refuse a model whose scores would mean nothing.

    Raises:
        ValueError: a number in it is NaN or infinite.
    """
    mapped = mapped_tables(model)
    tensors = (t for name, t in model.state_dict().items() if t.is_floating_point() and name not in mapped)
    if not all(tensor.isfinite().all() for tensor in tensors) or not tables_are_finite(model):
        raise ValueError(f"the model in {folder} holds numbers that are not finite")

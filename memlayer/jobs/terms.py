"""The terms that a learning run asks for, made from its settings, its checkpoint and its files."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from memlayer.data.facts import facts_of
from memlayer.data.lessons import Lesson, load_lessons
from memlayer.data.prompts import LESSON, Prompts
from memlayer.data.qa import Example, begin_tokens, encode, pad_token, pretraining_examples
from memlayer.jobs.config import LearnRun, facts_told, load_config
from memlayer.jobs.learn_settings import ContextConfig, ReplayConfig, TrustRegionConfig
from memlayer.jobs.lessons import prompts_of
from memlayer.jobs.preflight import check_lengths
from memlayer.methods.context import Context, InContext
from memlayer.methods.features import mean_hidden_states
from memlayer.methods.gradient_projection import AGem
from memlayer.methods.ngram_regulariser import NGramRegulariser
from memlayer.methods.replay import Replay
from memlayer.methods.replay_buffer import ReplayBuffer
from memlayer.methods.terms import Term
from memlayer.methods.trust_region import TrustRegion

GENERATED_AT_ONCE = 64


def terms_of(
    config: LearnRun, model: nn.Module, tokenizer, taught: Iterable[dict], lessons: Sequence[Lesson]
) -> list[Term]:
    """What each step heeds beside its lesson.

    Args:
        model: untouched, on the device where it will learn.
        taught: all examples of the lessons, encoded.
        lessons: what they are of, without what stands around a question.

    Raises:
        FactsError, ValueError: a file, or a setting that does not fit the checkpoint or several processes.
    """
    terms: list[Term] = []
    told, process = config.learn.terms, PartialState().process_index
    if told.replay is not None:
        replayed = _replayed(told.replay, config, model, tokenizer)
        seed = config.seed * 1_000 + process
        kept = {"batch_size": told.replay.batch_size, "loss_on": told.replay.loss_on, "seed": seed}
        if told.replay.target == "gradient":
            if PartialState().num_processes > 1:
                raise ValueError("learn.terms.replay.target=gradient needs one process: gradients are not averaged")
            terms.append(AGem(replayed, pad_token(tokenizer), **kept))
        else:
            weight, target = told.replay.weight, told.replay.target
            terms.append(Replay(replayed, pad_token(tokenizer), weight=weight, target=target, **kept))
    if told.ngram is not None:
        terms.append(NGramRegulariser(list(taught), pad_token(tokenizer), **asdict(told.ngram)))
    if told.trust_region is not None:
        bound, quantile = told.trust_region.bound, told.trust_region.quantile
        written = [each["input_ids"] for each in _generated(told.trust_region, config, model, tokenizer)]
        terms.append(TrustRegion(written, bound, quantile, config.seed))
    if (context := told.context) is not None:
        after = in_context(context, config, model, tokenizer, lessons)
        kept = {"weight": context.weight, "lesson_weight": context.lesson_weight, "only_right": context.only_right}
        terms.append(Context(after, pad_token(tokenizer), **kept))
    quiet = bool(config.trainer.get("disable_tqdm"))
    with tqdm(desc="looking at what should be kept", unit="example", delay=1, disable=quiet or not terms) as bar:
        for term in terms:
            term.begin(model, bar.update)
    return terms


def in_context(
    told: ContextConfig, config: LearnRun, model: nn.Module, tokenizer, lessons: Sequence[Lesson]
) -> list[InContext]:
    """Every example that something of its lesson can stand before, alone and after it.

    Raises:
        ValueError: of no lesson there is one; or the model has no room for one.
    """
    prompts = prompts_of(config.prompts)
    pairs = [
        (lesson.id, example, told.frame.replace(LESSON, before))
        for lesson in lessons
        for example in lesson.teach
        if not example.is_text and (before := _before(lesson, example))
    ]
    if not pairs:
        raise ValueError(
            "learn.terms.context: no lesson has a text, or another wording, to stand before its questions; job augment "
            "writes questions about texts"
        )
    alone = [prompts.apply(example, tokenizer) for _, example, _ in pairs]
    if prompts.style == "chat":  # what the user says begins with the lesson
        said = [replace(example, prompt=before + example.prompt) for _, example, before in pairs]
        after = [prompts.apply(example, tokenizer) for example in said]
    else:
        after = [replace(asked, prompt=before + asked.prompt) for asked, (_, _, before) in zip(alone, pairs)]
    encoded = [encode(tokenizer, each) for each in (alone, after)]
    if positions := getattr(model.config.get_text_config(), "max_position_embeddings", None):
        check_lengths(encoded[1], positions, after)
    # What ends an answer is left out: told apart by what the answer is with another end, the tokenizer's own token.
    bare = encode(tokenizer, [replace(example, end="") for example in after])
    words = [each["length"] - each["answer_start"] - 1 for each in bare]
    return [InContext(id, *both, num_said) for (id, *_), *both, num_said in zip(pairs, *encoded, words, strict=True)]


def _before(lesson: Lesson, example: Example) -> str:
    """What of a lesson stands before one of its examples, without the full stop that the frame has."""
    texts = [each.text.strip() for each in lesson.teach if each.is_text]
    others = [each for each in lesson.teach if each != example]
    others.sort(key=lambda each: each.is_question)  # statements first, in their order
    return " ".join(texts or [each.text for each in others[:1]]).removesuffix(".")


def _replayed(told: ReplayConfig, config: LearnRun, model: nn.Module, tokenizer) -> list[dict]:
    """All that is replayed, encoded."""
    prompts = prompts_of(config.prompts)
    of_files, known = _of_files(told, prompts, tokenizer), _known(told, config, prompts, tokenizer)
    groups = ["files"] * len(of_files) + [relation for relation, _ in known] + ["generated"] * told.generated
    encoded = encode(tokenizer, of_files + [example for _, example in known])
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for example in encoded if positions else ():
        if example["length"] > positions:
            raise ValueError(f"a replayed example has {example['length']} tokens, the model has {positions} positions")
    encoded += _generated(told, config, model, tokenizer)
    return encoded if told.keep is None else _kept(told, config, model, tokenizer, encoded, groups)


def _kept(
    told: ReplayConfig, config: LearnRun, model: nn.Module, tokenizer, examples: list[dict], groups: list[str]
) -> list[dict]:
    """Those of the examples that are kept, by what the untouched model makes of them."""
    quiet = bool(config.trainer.get("disable_tqdm"))
    with tqdm(total=len(examples), desc="choosing what is replayed", unit="example", delay=1, disable=quiet) as bar:
        features_ND = mean_hidden_states(model, examples, pad_token(tokenizer), progress=bar.update)
    buffer = ReplayBuffer(told.keep, told.keep_by, config.seed)
    for group in dict.fromkeys(groups):
        places = [place for place, each in enumerate(groups) if each == group]
        buffer.add(group, [examples[place] for place in places], features_ND[places])
    return buffer.examples


def _of_files(told: ReplayConfig, prompts: Prompts, tokenizer) -> list[Example]:
    if not told.files:
        return []
    return [prompts.apply(example, tokenizer) for lesson in load_lessons(told.files) for example in lesson.teach]


def _known(told: ReplayConfig, config: LearnRun, prompts: Prompts, tokenizer) -> list[tuple[str, Example]]:
    """Known facts of the checkpoint with their relations, each in a wording that it was pretrained on."""
    first, last = told.known
    if first == last:
        return []
    made = Path(config.checkpoint) / "config.yaml"
    pretrained_on = facts_told(load_config(made)) if made.is_file() else None
    if pretrained_on is None:
        raise ValueError(f"learn.terms.replay.known is {told.known}: {config.checkpoint} was not pretrained on facts")
    facts, draw = facts_of(**asdict(pretrained_on[0])), random.Random(config.seed)
    if last > len(facts.known):
        raise ValueError(f"learn.terms.replay.known is {told.known}, there are {len(facts.known)} known facts")
    told_in = [(fact.relation, pretraining_examples([fact], facts.wordings, False)) for fact in facts.known[first:last]]
    return [(relation, prompts.apply(draw.choice(wordings), tokenizer)) for relation, wordings in told_in]


@torch.no_grad()
def _generated(told: ReplayConfig | TrustRegionConfig, config: LearnRun, model: nn.Module, tokenizer) -> list[dict]:
    """Texts that the untouched model writes itself, from what it takes for the beginning of a text."""
    begin = begin_tokens(tokenizer) or [tokenizer.eos_token_id]
    generator_state = torch.get_rng_state()
    torch.manual_seed(config.seed)
    written: list[dict] = []
    with tqdm(
        total=told.generated,
        desc="the untouched model writes texts of its own",
        unit="text",
        disable=not told.generated or bool(config.trainer.get("disable_tqdm")),
    ) as bar:
        while len(written) < told.generated:
            number = min(GENERATED_AT_ONCE, told.generated - len(written))
            begin_BL = torch.tensor([begin] * number, device=next(model.parameters()).device)
            ids_BL = model.generate(
                input_ids=begin_BL,
                attention_mask=torch.ones_like(begin_BL),
                max_new_tokens=told.length,
                do_sample=True,
                top_k=0,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=pad_token(tokenizer),
            )
            written += [_until_end(ids, len(begin), tokenizer.eos_token_id) for ids in ids_BL.tolist()]
            bar.update(number)
    torch.set_rng_state(generator_state)
    return written


def _until_end(ids: list[int], begin: int, end: int) -> dict:
    if end in ids[begin:]:
        ids = ids[: ids.index(end, begin) + 1]
    return {"input_ids": ids, "answer_start": begin, "length": len(ids)}

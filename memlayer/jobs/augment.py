"""The augment job: a causal language model writes study texts about lessons, which are then taught with them.

What it writes is a file of lessons: each as it was, with the texts that ``study_texts`` kept behind what it taught
already. What a lesson asks is not changed and never taught. A run that was stopped goes on with the next lesson, and
ends with the same file: what is drawn for a lesson follows from the seed and the lesson alone.
"""

import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import set_seed

from memlayer.data.lessons import Lesson, as_record
from memlayer.data.qa import encode_prompts, pad_token
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.evaluation.qa import end_tokens
from memlayer.files import sha256_of, write_file, writing
from memlayer.jobs.bases import load_decoder
from memlayer.jobs.config import AugmentRun
from memlayer.jobs.lessons import lessons_of
from memlayer.jobs.run_folder import CONFIG, claimed, describe, differences, write_result
from memlayer.jobs.study_texts import kept, request
from memlayer.jobs.taught import files_of
from memlayer.machine import best_device, has_fast_bfloat16, use_threads

log = logging.getLogger(__name__)
LESSONS_FILE, WRITING = "lessons.jsonl", ".writing"
END = "\n\n"  # after which no kind of study text goes on


def augment(config: AugmentRun) -> Path:
    """Write study texts for each lesson.

    Returns:
        the file of lessons.

    Raises:
        FileNotFoundError, ValueError: the base, a file or a setting does not fit, or the output holds something else.
    """
    lessons = lessons_of(config)
    writer = _Writer(config)
    longest = max(map(writer.length, lessons))
    if (needed := longest + config.augment.max_new_tokens) > writer.positions:
        raise ValueError(
            f"a lesson's request and augment.max_new_tokens = {config.augment.max_new_tokens} take {needed} tokens, "
            f"base {config.base} has {writer.positions} positions: cut documents by a lower lessons.chunk_words"
        )
    inputs = {"base": state_fingerprint(writer.model)}
    inputs |= {name: sha256_of(path) for name, path in files_of(config).items()}
    with claimed(config, inputs) as done:
        if not done and PartialState().is_main_process:
            _write(config, inputs, lessons, writer)
    return Path(config.output) / LESSONS_FILE


def _write(config: AugmentRun, inputs: Mapping[str, str], lessons: Sequence[Lesson], writer: "_Writer") -> None:
    begun = Path(config.output) / WRITING
    written = _written(begun, config, inputs)
    with tqdm(total=len(lessons), initial=len(written), desc=f"{config.base} writes", unit="lesson") as bar:
        for lesson in lessons[len(written) :]:
            with _noting(f"stopped after {len(written)} of {len(lessons)} lessons; the same command goes on"):
                line = json.dumps(as_record(writer.study(lesson), source=config.base), ensure_ascii=False)
            with writing(begun / LESSONS_FILE), (begun / LESSONS_FILE).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            written.append(line)
            bar.update()
    taught = [len(json.loads(line)["teach"]) for line in written]
    added = sum(taught) - sum(len(lesson.teach) for lesson in lessons)
    bare = sum(now == len(lesson.teach) for now, lesson in zip(taught, lessons, strict=True))
    without = f"; {bare} of {len(lessons)} lessons have none" if bare else ""
    asked = len(lessons) * len(config.augment.kinds) * writer.texts
    print(f"{added} of {asked} study texts are kept, the others lost the thread or said nothing new{without}")
    write_result(config.output, config, inputs, lambda f: write_file(f / LESSONS_FILE, "\n".join(written) + "\n"))
    shutil.rmtree(begun)


@contextmanager
def _noting(words: str) -> Iterator[None]:
    """Let whoever stops what runs inside be told so."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(words)
        raise


def _written(begun: Path, config: AugmentRun, inputs: Mapping[str, str]) -> list[str]:
    """The lines that a stopped run of the same settings over the same lessons wrote whole.

    Raises:
        ValueError: they are of another run.
    """
    file = begun / LESSONS_FILE
    if (begun / CONFIG).is_file() and file.is_file():
        if other := differences(begun / CONFIG, config, inputs):
            raise ValueError(f"{begun} holds study texts of another run ({other}): name another output, or delete it")
        lines = file.read_text(encoding="utf-8").split("\n")
        write_file(file, "".join(f"{line}\n" for line in lines[:-1]))  # behind the last newline, half a line
        return lines[:-1]
    begun.mkdir(exist_ok=True)
    write_file(begun / CONFIG, describe(config, inputs))
    write_file(file, "")
    return []


class _Writer:
    """A language model that writes about lessons, one lesson and kind at a time."""

    def __init__(self, config: AugmentRun):
        self._settings, self._seed = config.augment, config.seed
        self.texts = config.augment.texts if config.augment.temperature else 1
        dtype = config.augment.dtype
        if dtype == "auto":
            dtype = "bfloat16" if has_fast_bfloat16() else "float32"
        model, self._tokenizer = load_decoder(config.base, config.augment.revision, getattr(torch, dtype), "write")
        self.model = model.to(best_device())
        self.positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 31
        use_threads()

    def length(self, lesson: Lesson) -> int:
        """Tokens of the longest request about a lesson."""
        return max(len(self._ids(lesson, kind)) for kind in self._settings.kinds)

    def study(self, lesson: Lesson) -> Lesson:
        """The lesson with what was written about it, and kept, behind what it teaches."""
        for kind in self._settings.kinds:
            set_seed(zlib.crc32(f"{self._seed} {kind} {lesson.id}".encode()))
            lesson = replace(lesson, teach=(*lesson.teach, *kept(lesson, kind, self._writings(lesson, kind))))
        return lesson

    def _ids(self, lesson: Lesson, kind: str) -> list[int]:
        return encode_prompts(self._tokenizer, [request(lesson, kind)])[0]

    @torch.no_grad()
    def _writings(self, lesson: Lesson, kind: str) -> list[str]:
        settings, ids = self._settings, self._ids(lesson, kind)
        drawn = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        ids_TL = self.model.generate(
            input_ids=torch.tensor([ids], device=self.model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=self.model.device),
            max_new_tokens=settings.max_new_tokens,
            num_return_sequences=self.texts,
            eos_token_id=end_tokens(self.model, self._tokenizer, {END}),
            pad_token_id=pad_token(self._tokenizer),
            **(drawn if settings.temperature else {"do_sample": False}),
        )
        return self._tokenizer.batch_decode(ids_TL[:, len(ids) :], skip_special_tokens=True)

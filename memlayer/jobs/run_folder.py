"""The folder of a run: whether its result is there, whose it is, and how a result comes to be there.

One rule for every job:

- A folder whose ``config.yaml`` is there holds a finished result: ``config.yaml`` comes last. A run of the same
  settings over the same inputs finds its work done and changes nothing; any other run is refused before it trains.
- A result is made in ``.unfinished`` inside the folder and moved to its place when it is whole. A run that was stopped
  goes on from there, if its trained model is there, or from its newest whole checkpoint.
- A run deletes and replaces nothing that it did not write: files in its way are a refusal.

Two runs are the same when their resolved settings are, ``output`` and what changes no result left out, and their input
files by content, not by name.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from filelock import FileLock, Timeout

from memlayer.files import write_file, writing
from memlayer.jobs.config import RunConfig, load_config, to_yaml
from memlayer.jobs.preflight import check_output

CONFIG, UNFINISHED, TRAINED, LOCK = "config.yaml", ".unfinished", "trained.yaml", ".lock"
# What jobs write, beside config.yaml.
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*")
RESULTS = {
    "pretrain": MODEL_FILES,
    "pretrain_text": (*MODEL_FILES, "results.json"),
    "compare_pretraining": ("results.json", "report.md", "curves.png", "stated.jsonl"),
    "retrofit": (*MODEL_FILES, "results.json", "report.md", "losses.png"),
    "augment": ("lessons.jsonl",),
    "learn": ("patch", "equations.safetensors", "model", "store", "learned.json", "answers.jsonl", "probes.json"),
    "compare": ("results.json", "report.md", "pareto.png", "samples.jsonl"),
}
WITHOUT_EFFECT = {"output", "table.place", "table.shards"}
WITHOUT_EFFECT |= {f"trainer.{name}" for name in ("disable_tqdm", "report_to", "run_name")}
WITHOUT_EFFECT |= {f"trainer.{name}" for name in ("logging_steps", "logging_strategy", "save_total_limit")}
# Settings that name a file -> the input that stands for its content.
CONTENT_OF = {"checkpoint": "checkpoint", "base": "base", "text.files": "text"}
CONTENT_OF |= {"data.facts": "facts", "data.wordings": "wordings", "lessons.files": "lessons 1"}
CONTENT_OF |= {"model.config": "architecture", "tokenizer.name": "tokenizer"}
CONTENT_OF |= {"retrofit.background_lessons": "background lessons 1", "prompts.shots": "shots"}
SOURCE = "source "  # and its name: the input that stands for what is in its files
DIGEST = "# SHA-256 of "
NAMED = 3  # differences that a refusal names


def describe(config: RunConfig, inputs: Mapping[str, str]) -> str:
    """The text of a run's config.yaml: the resolved settings, and name and SHA-256 of each input as comments."""
    return to_yaml(config) + "".join(f"{DIGEST}{name}: {digest}\n" for name, digest in sorted(inputs.items()))


def differences(file: Path, config: RunConfig, inputs: Mapping[str, str]) -> str:
    """What tells the run that wrote ``file`` from this one, in words; empty where nothing does.

    Raises:
        ValueError: the file is not a run's.
    """
    try:
        theirs = _told(load_config(file), _digests(file))
    except ValueError as error:
        raise ValueError(f"{file} was written by no run of memlayer ({error}): name another output") from error
    ours = _told(config, inputs)
    keys = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
    keys.sort(key=lambda key: not (key in theirs and key in ours))  # then those that only one of two methods has
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(f"{key} was {theirs.get(key)}, is {ours.get(key)}" for key in keys[:NAMED]) + more


def is_finished(folder: str | Path) -> bool:
    """Whether a folder holds a finished result, whosoever's and be it not in its place yet."""
    return any((place / CONFIG).is_file() for place in (Path(folder), Path(folder) / UNFINISHED))


def is_done(folder: str | Path, config: RunConfig, inputs: Mapping[str, str]) -> bool:
    """Whether the folder holds the finished result of this very run.

    Raises:
        ValueError: it holds that of another run, one that was stopped, or files that are in the way.
    """
    folder = Path(folder)
    _move_whole_result(folder)
    done = is_finished(folder)
    for file, what in ((folder / CONFIG, "a finished result"), (folder / UNFINISHED / TRAINED, "a trained model")):
        if file.is_file() and (other := differences(file, config, inputs)):
            raise ValueError(f"{folder} holds {what} of another run ({other}): name another output, or delete it")
    if not done:
        for pattern in RESULTS[config.job]:
            for path in folder.glob(pattern):
                raise ValueError(f"{path} is in the way, and no finished run wrote it: name another output")
    return done


@contextmanager
def claimed(config: RunConfig, inputs: Mapping[str, str]) -> Iterator[bool]:
    """Hold the output of a run for it alone; gives whether its result is there already.

    Raises:
        ValueError: another run holds it, or what ``is_done`` and ``check_output`` refuse.
    """
    folder = Path(config.output)
    check_output(folder)
    if not PartialState().is_main_process:
        PartialState().wait_for_everyone()
        yield is_done(folder, config, inputs)
        return
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another run is writing to {folder}: wait for its end, or name another output") from None
    try:
        done = is_done(folder, config, inputs)
        PartialState().wait_for_everyone()
        yield done
    except KeyboardInterrupt as stop:
        stop.add_note("stopped; the same command " + ("goes on" if trained_model(folder) else "starts anew"))
        raise
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: who opened it before sees that it is gone
        lock.release()


def trained_model(folder: str | Path) -> Path | None:
    """Where a stopped run of this folder left its trained model, if it did; ``is_done`` has seen whose it is."""
    unfinished = Path(folder) / UNFINISHED
    return unfinished if (unfinished / TRAINED).is_file() else None


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse what no run may write.

    Raises:
        ValueError: a tensor holds nan or infinity.
    """
    for name, tensor in tensors.items():
        if spoiled := int((~torch.isfinite(tensor.detach())).sum()):
            raise ValueError(
                f"{spoiled} of {tensor.numel()} numbers of {name} are nan or infinite: nothing is written; "
                "a lower learning rate may help"
            )


def write_trained(
    folder: str | Path, config: RunConfig, inputs: Mapping[str, str], write: Callable[[Path], Any]
) -> None:
    """Begin a result with what training has cost so much to make; what is written here survives all that follows."""
    unfinished = _new(folder)
    with _whole_or_gone(unfinished):
        write(unfinished)
        write_file(unfinished / TRAINED, describe(config, inputs))


def write_result(
    folder: str | Path, config: RunConfig, inputs: Mapping[str, str], write: Callable[[Path], Any]
) -> None:
    """Write a result, or the rest of one that ``write_trained`` began, and move it to its place.

    Raises:
        ValueError: something is in the way; the result stays in ``.unfinished`` then.
        NotWritten: nothing is left then of what was written here.
    """
    unfinished = trained_model(folder) or _new(folder)
    with _whole_or_gone(unfinished):
        write(unfinished)
        write_file(unfinished / CONFIG, describe(config, inputs))
    _move_whole_result(Path(folder))


def _told(config: RunConfig, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Everything a result depends on, flat."""
    settings = _flat(yaml.safe_load(to_yaml(config)))
    by_content = {name for name, content in CONTENT_OF.items() if content in inputs}
    by_content |= {f"text.sources.{name.removeprefix(SOURCE)}.files" for name in inputs if name.startswith(SOURCE)}
    kept = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT | by_content}
    return kept | {f"SHA-256 of {name}": digest for name, digest in inputs.items()}


def _flat(settings: Mapping, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _digests(file: Path) -> dict[str, str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = (line.removeprefix(DIGEST).split(": ") for line in lines if line.startswith(DIGEST))
    return dict(pairs)


def _new(folder: str | Path) -> Path:
    unfinished = Path(folder) / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed before it had anything whole
    unfinished.mkdir(parents=True)
    return unfinished


@contextmanager
def _whole_or_gone(unfinished: Path) -> Iterator[None]:
    """Remove what was begun if it cannot be finished, but for a trained model."""
    begun = set(unfinished.iterdir())
    try:
        with writing(unfinished.parent):
            yield
    except BaseException:
        for path in set(unfinished.iterdir()) - begun:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not begun:
            unfinished.rmdir()
        raise


def _move_whole_result(folder: Path) -> None:
    """Move a result that is whole to its place, config.json and config.yaml last: they are what others look for."""
    unfinished = folder / UNFINISHED
    if not (unfinished / CONFIG).is_file():
        return
    (unfinished / TRAINED).unlink(missing_ok=True)
    order = {"config.json": 1, CONFIG: 2}
    paths = sorted(unfinished.iterdir(), key=lambda path: order.get(path.name, 0))
    for path in paths:
        if (folder / path.name).exists():
            raise ValueError(f"{folder / path.name} is in the way: the result is whole and waits in {unfinished}")
    for path in paths:
        path.rename(folder / path.name)
    unfinished.rmdir()

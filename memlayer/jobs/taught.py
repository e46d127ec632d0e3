"""What a learning run writes, and whether it fits what is there now when it is read again.

A run's scores mean something only beside the checkpoint that it began with and on the facts that it was taught,
so learned.json keeps the SHA-256 of each.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase

from memlayer import __version__
from memlayer.data.facts import BUILTIN_FACTS, BUILTIN_WORDINGS
from memlayer.data.hub_sets import local_file
from memlayer.decoders import files
from memlayer.decoders.looked_at import checkpoint_fingerprint
from memlayer.decoders.mapped import mapped_tables
from memlayer.evaluation.provenance import commit
from memlayer.evaluation.rows import COSTS
from memlayer.files import sha256_of, write_file
from memlayer.jobs.config import RunConfig, load_config
from memlayer.jobs.run_folder import check_finite, is_done, write_result
from memlayer.methods import STORES, Store, lora
from memlayer.patch import MemoryPatch, patches

RECORD, ADAPTER = "learned.json", "adapter"
RECORDED = (*COSTS, "resumed_at", "steps_left_out", "capacity", "found", "sha256")


@dataclass
class Learned:
    """The outcome of one learning run.

    Attributes:
        model: the model that has learned, an ordinary one again; with a store attached, where the method keeps one.
        patch: the rows changed, where the method changes memory rows only.
        seconds: time of the learning alone, from step ``resumed_at``.
        parameters_changed: numbers in the model that are not what they were, or that were put beside them.
        may_change: numbers that one step may change.
        examples, tokens: what it was shown since ``resumed_at``, replayed examples included.
        sha256: name and SHA-256 of what the run started from: checkpoint, facts, wordings, background counts.
        steps_left_out: of those since ``resumed_at``, the steps whose loss was below ``learn.skip_below``.
        capacity: per table how full it is, where the method writes into one; see ``methods.open_table.Capacity``.
        store: the lessons beside the model, where the method changes no weight.
        save_adapter: writes what answers beside the weights, where the method keeps it apart.
        save_beside: writes what changing the patch later takes, where the method keeps that.
        found: what terms found when they looked at the untouched model, see ``methods.terms``.
    """

    config: RunConfig
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    patch: MemoryPatch | None
    seconds: float
    steps: int
    parameters_changed: int
    may_change: int
    examples: int
    tokens: int
    resumed_at: int = 0
    sha256: dict[str, str] = field(default_factory=dict)
    steps_left_out: int = 0
    capacity: dict[str, dict[str, int]] = field(default_factory=dict)
    store: Store | None = None
    save_adapter: Callable[[Path], None] | None = None
    save_beside: Callable[[Path], None] | None = None
    found: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Taught:
    """A folder that ``save_learned`` wrote.

    Attributes:
        costs: by ``evaluation.rows.COSTS``, as in ``Learned``; runs of older versions tell some of them.
        sha256: of the ``checkpoint`` (its state), the ``facts`` and the ``wordings`` that the run began with.
    """

    folder: Path
    config: RunConfig
    costs: dict[str, float]
    sha256: dict[str, str]

    def check_files(self) -> None:
        """Refuse facts and wordings that are not the ones the run was taught.

        Raises:
            ValueError: a file has changed, or is gone.
        """
        for name, path in files_of(self.config).items():
            if not path.is_file() or sha256_of(path) != self.sha256[name]:
                raise ValueError(
                    f"the {name} in {path} are not what {self.folder} was taught: bring that file back, or teach again"
                )

    def check_checkpoint(self, checkpoint: str | Path, fingerprint: str) -> None:
        """Refuse another checkpoint than the run began with.

        Args:
            checkpoint: what the error calls it.
            fingerprint: ``decoders.fingerprint.state_fingerprint`` of its model.

        Raises:
            ValueError: it is another one.
        """
        if fingerprint != self.sha256["checkpoint"]:
            raise ValueError(
                f"{self.folder} was not taught to the model that is in {checkpoint}: it began with "
                f"{self.config.checkpoint}, as that was then"
            )

    @property
    def has_model(self) -> bool:
        """Whether the run wrote a whole model, rather than a patch."""
        return (self.folder / "model").is_dir()

    @property
    def has_adapter(self) -> bool:
        """Whether the run wrote what answers beside the model's weights."""
        return (self.folder / ADAPTER).is_dir()

    def _attach(self, model: nn.Module) -> Callable[[], None]:
        """Have a model answer with the store or the adapter; returns what takes that off again."""
        return lora.attach(model, self.folder / ADAPTER) if self.has_adapter else self.store.attach(model)

    @cached_property
    def store(self) -> Store | None:
        """The lessons that are kept beside the model, where the run's method changes no weight."""
        kind = STORES.get(self.config.learn.method)
        return kind and kind.read(self.folder / "store", self.config.learn)

    @contextmanager
    def model(
        self, base: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[tuple[nn.Module, PreTrainedTokenizerBase]]:
        """The model that has learned: that of the folder, or ``base`` with patch, store or adapter in this context.

        Raises:
            FileNotFoundError: the folder holds none of them.
            ValueError: the patch or the store does not fit, or a file is damaged.
        """
        if self.has_model:
            yield files.load(self.folder / "model")
        elif self.store is not None or self.has_adapter:
            take_off = self._attach(base)
            try:
                yield base, tokenizer
            finally:
                take_off()
        else:
            with patches(base, [MemoryPatch.load(self.folder / "patch")]):
                yield base, tokenizer


def save_learned(learned: Learned, folder: str | Path, with_model: bool = True) -> None:
    """Write the patch, the store, the adapter or else the whole model, with the resolved config and what it took.

    Args:
        with_model: False leaves a whole model out, for comparisons that only ask it questions.

    Raises:
        ValueError: the folder holds a result or files that are in the way, or what was learned is nan or infinite;
            nothing is written then.
    """
    if PartialState().is_main_process:
        if is_done(folder, learned.config, learned.sha256):
            raise ValueError(f"{folder} holds this result already: name another folder, or delete it")
        write_result(folder, learned.config, learned.sha256, partial(write_learned, learned, with_model=with_model))
    PartialState().wait_for_everyone()


def write_learned(learned: Learned, folder: Path, with_model: bool) -> None:
    """Write the files of ``save_learned`` but the config."""
    if learned.patch is not None:
        check_finite({f"the patch of {name}": table.rows for name, table in learned.patch.tables.items()})
        learned.patch.save(folder / "patch")
        if learned.save_beside is not None:
            learned.save_beside(folder)
    elif learned.store is not None:
        learned.store.save(folder / "store")
    elif learned.save_adapter is not None:
        learned.save_adapter(folder / ADAPTER)
    elif with_model:
        mapped = mapped_tables(learned.model)
        check_finite({name: p for name, p in learned.model.named_parameters() if name not in mapped})
        files.save(learned.model, learned.tokenizer, folder / "model")
    took = {key: getattr(learned, key) for key in RECORDED}
    write_file(folder / RECORD, json.dumps(took, indent=2) + "\n")


def is_taught(folder: str | Path) -> bool:
    """Whether a folder is one that a learning run wrote."""
    return (Path(folder) / RECORD).is_file()


def read_taught(folder: str | Path) -> Taught:
    """Read what ``save_learned`` wrote, but for the model.

    Raises:
        FileNotFoundError: the run is not complete.
        ValueError: it is of a version that did not keep what it was taught from.
    """
    folder = Path(folder)
    config = load_config(folder / "config.yaml")
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"{folder} is not what job learn writes: {RECORD} is missing")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if not {"checkpoint", *files_of(config)} <= record.get("sha256", {}).keys():
        raise ValueError(f"{folder} does not say which checkpoint and facts it was taught from: teach again")
    return Taught(folder, config, {key: record[key] for key in COSTS if key in record}, record["sha256"])


def load_learned(checkpoint: str | Path, folder: str | Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model that ``save_learned`` wrote: the checkpoint with patch, store or adapter, or a whole model.

    A store that changes what is asked leaves its model as it is: ``read_taught(folder).store`` says what to ask.

    Raises:
        FileNotFoundError: the folder holds none of them.
        ValueError: the run began with another checkpoint, or the facts it was taught have changed.
    """
    taught = read_taught(folder)
    taught.check_files()
    model, tokenizer = files.load(checkpoint)
    taught.check_checkpoint(checkpoint, checkpoint_fingerprint(model))
    if taught.has_model:
        return files.load(taught.folder / "model")
    if taught.store is not None or taught.has_adapter:
        taught._attach(model)
        return model, tokenizer
    MemoryPatch.load(taught.folder / "patch").apply(model)
    return model, tokenizer


def files_of(config: RunConfig) -> dict[str, Path]:
    """The facts and the wordings that a run reads, or the lessons in their place."""
    prompts, lessons = getattr(config, "prompts", None), getattr(config, "lessons", None)
    shots = {"shots": local_file(prompts.shots)} if prompts and prompts.shots else {}
    if lessons and lessons.files:
        return {f"lessons {number}": local_file(path) for number, path in enumerate(lessons.files, start=1)} | shots
    data = config.data
    return shots | {"facts": Path(data.facts or BUILTIN_FACTS), "wordings": Path(data.wordings or BUILTIN_WORDINGS)}


def provenance(config: RunConfig, sha256: Mapping[str, str]) -> dict:
    """Where a learning run's patch comes from, for JSON: what was taught, how, and into which model."""
    return {
        "checkpoint": config.checkpoint,
        "data": asdict(config.data),
        "lessons": asdict(config.lessons),
        "prompts": asdict(config.prompts),
        "learn": asdict(config.learn),
        "seed": config.seed,
        "sha256": dict(sha256),
        "memlayer_version": __version__,
        "commit": commit(),
    }

"""What a learning run wrote beside its patch or model, and whether it fits what is there now.

A run's scores mean something only beside the checkpoint that it began with and on the facts that it was taught,
so learned.json keeps the SHA-256 of each.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from memlayer.data.facts import BUILTIN_FACTS, BUILTIN_WORDINGS
from memlayer.decoders import files
from memlayer.files import sha256_of
from memlayer.jobs.config import DataConfig, RunConfig, load_config
from memlayer.patch import MemoryPatch, patches

RECORD = "learned.json"


@dataclass(frozen=True)
class Taught:
    """A folder that ``recipes.save_learned`` wrote.

    Attributes:
        seconds, parameters_changed: as in ``recipes.Learned``.
        sha256: of the ``checkpoint`` (its state), the ``facts`` and the ``wordings`` that the run began with.
    """

    folder: Path
    config: RunConfig
    seconds: float
    parameters_changed: int
    sha256: dict[str, str]

    def check_files(self) -> None:
        """Refuse facts and wordings that are not the ones the run was taught.

        Raises:
            ValueError: a file has changed, or is gone.
        """
        for name, path in files_of(self.config.data).items():
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

    @contextmanager
    def model(
        self, base: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[tuple[nn.Module, PreTrainedTokenizerBase]]:
        """The model that has learned: the one in the folder, or ``base`` with the patch until the context ends.

        Raises:
            FileNotFoundError: the folder holds neither.
            ValueError: the patch does not fit, or a file is damaged.
        """
        if self.has_model:
            yield files.load(self.folder / "model")
        else:
            with patches(base, [MemoryPatch.load(self.folder / "patch")]):
                yield base, tokenizer


def is_taught(folder: str | Path) -> bool:
    """Whether a folder is one that a learning run wrote."""
    return (Path(folder) / RECORD).is_file()


def read_taught(folder: str | Path) -> Taught:
    """Read what ``recipes.save_learned`` wrote, but for the model.

    Raises:
        FileNotFoundError: the run is not complete.
        ValueError: it is of a version that did not keep what it was taught from.
    """
    folder = Path(folder)
    config = load_config(folder / "config.yaml")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if not {"checkpoint", "facts", "wordings"} <= record.get("sha256", {}).keys():
        raise ValueError(f"{folder} does not say which checkpoint and facts it was taught from: teach again")
    return Taught(folder, config, record["seconds"], record["parameters_changed"], record["sha256"])


def files_of(data: DataConfig) -> dict[str, Path]:
    """The facts and the wordings that a run reads."""
    return {"facts": Path(data.facts or BUILTIN_FACTS), "wordings": Path(data.wordings or BUILTIN_WORDINGS)}

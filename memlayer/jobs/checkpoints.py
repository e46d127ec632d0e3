"""Where a run that was stopped goes on from.

transformers' ``get_last_checkpoint`` takes the highest number, whole or not; here a checkpoint that a kill or a full
disk cut short is passed over for the one before it.
"""

import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from memlayer.files import write_file
from memlayer.jobs.config import RunConfig
from memlayer.jobs.run_folder import CONFIG, describe, differences

logger = logging.getLogger(__name__)


def checkpoint_to_resume(arguments: TrainingArguments, config: RunConfig, inputs: Mapping[str, str]) -> Path | None:
    """The newest whole checkpoint that a stopped run of the same settings over the same inputs left.

    Raises:
        ValueError: the checkpoints there are of another run, or of no run of ours.
    """
    folder = Path(arguments.output_dir)
    started, found = folder / CONFIG, _checkpoints(folder)
    if found and not started.is_file():
        raise ValueError(f"{folder} holds checkpoints that no run of memlayer wrote: name another output")
    if started.is_file() and (other := differences(started, config, inputs)) and found:
        raise ValueError(f"{folder} holds checkpoints of another run ({other}): name another output, or delete it")
    for checkpoint in found:
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        if PartialState().is_main_process:
            logger.warning("%s is passed over: %s", checkpoint, damage)
    if PartialState().is_main_process:
        write_file(started, describe(config, inputs))
    return None


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in a folder."""
    return next((each for each in _checkpoints(Path(folder)) if damage_of(each) is None), None)


def step_of(checkpoint: Path | None) -> int:
    """The step after which the Trainer wrote a checkpoint; 0 where there is none."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def damage_of(checkpoint: Path) -> str | None:
    """What a checkpoint lacks: its first file that is missing or cut short. The Trainer writes its state last."""
    for name in (TRAINER_STATE_NAME, OPTIMIZER_NAME):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for file in sorted(checkpoint.iterdir()):
        if not _is_whole(file):
            return f"{file.name} is damaged"
    return None


def _is_whole(file: Path) -> bool:
    """As far as it shows without reading all of it: zip files have their directory at the end."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix in (".pt", ".pth"):
            return zipfile.is_zipfile(file)
    except (ValueError, SafetensorError):
        return False
    return True

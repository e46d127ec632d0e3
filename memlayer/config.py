"""What a run is told: one dataclass per section, read from YAML with dotted overrides.

OmegaConf checks names and types (and reads ``1e-4`` as a number, which PyYAML does not); unknown keys
are refused. The resolved configuration is saved with every run.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memlayer.checks import check_at_least, check_choice
from memlayer.machine import resolve_precision
from memlayer.memory_config import MemoryConfig

LOSS_ON = ("all", "answer")


@dataclass
class ModelConfig:
    """A Llama-architecture decoder built from scratch."""

    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    ffn_width: int = 512
    max_length: int = 64
    vocab_size: int = 2048

    def __post_init__(self):
        check_at_least(1, "model", self, "num_layers", "width", "num_heads", "ffn_width", "max_length")
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"model.width is {self.width}, must be a multiple of twice model.num_heads = {self.num_heads}: "
                "rotary positions turn pairs of a head's numbers"
            )


@dataclass
class DataConfig:
    """Facts to train on or to teach.

    Attributes:
        facts: a JSON Lines file of facts; None is the built-in table.
        wordings: a JSON file of wordings; None is the built-in ones.
        num_known: known facts to pretrain on and to be asked about; None is all.
        num_new: new facts to teach; None is all from ``first_new`` on.
        first_new: where in the table's new facts to start.
    """

    facts: str | None = None
    wordings: str | None = None
    num_known: int | None = None
    num_new: int | None = None
    first_new: int = 0


@dataclass
class PretrainConfig:
    """Pretraining. Tables have a constant learning rate and no weight decay.

    Attributes:
        unseen_wordings: tell half of the known facts in the wordings too in which the others are asked only; false
            keeps those wordings out of pretraining, so that not even the sentences are known.
    """

    steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 2e-3
    table_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    loss_on: str = "all"
    unseen_wordings: bool = True

    def __post_init__(self):
        check_at_least(1, "pretrain", self, "steps", "batch_size")
        check_at_least(0, "pretrain", self, "learning_rate", "table_learning_rate", "weight_decay", "warmup_steps")
        check_choice("pretrain.loss_on", self.loss_on, LOSS_ON)


@dataclass
class CountConfig:
    """What a background document is: so many consecutive sequences of pretraining text."""

    sequences_per_document: int = 8

    def __post_init__(self):
        check_at_least(1, "count", self, "sequences_per_document")


@dataclass
class LearnConfig:
    """How new facts are taught, one fact after the other.

    Attributes:
        method: a name in ``memlayer.methods.METHODS``.
        learning_rate: of the method's optimizer.
        steps_per_fact: optimizer steps on a fact before the next one.
        statements, questions: seen wordings of the fact in each step's batch.
        loss_on: "all" tokens or the "answer".
        num_rows: sparse memory: slots a step may change.
        idf_power: sparse memory: 1 ranks slots as the paper does; more avoids those that background text reads.
        positions: sparse memory: reads counted at "all" positions or those that predict the "answer".
        protect: sparse memory: how many background documents a fact counts as once it is taught; its rows are
            then chosen less by later facts. 0 is the paper's rule.
        optimizer: sparse memory: "sgd" or "adam".
        lora_rank: rank of the LoRA matrices; their scale alpha is ``lora_alpha``.
    """

    method: str = "sparse_memory"
    learning_rate: float = 10.0
    steps_per_fact: int = 5
    statements: int = 3
    questions: int = 3
    loss_on: str = "answer"
    num_rows: int = 400
    idf_power: float = 8.0
    positions: str = "all"
    protect: int = 10
    optimizer: str = "sgd"
    lora_rank: int = 32
    lora_alpha: float = 32.0

    def __post_init__(self):
        check_at_least(1, "learn", self, "steps_per_fact")
        check_at_least(0, "learn", self, "protect")
        check_choice("learn.loss_on", self.loss_on, LOSS_ON)


@dataclass
class TextConfig:
    """The text that a retrofitted model is healed and measured on; see ``memlayer.data.text``.

    Attributes:
        files: text, JSON or Parquet files; with no dataset either, sentences of the built-in known facts.
        dataset, subset, split: a dataset of the Hugging Face hub, streamed.
        column: where its text is.
        limit: documents to read at most; None is as many as needed.
        length: tokens of a window.
        num_train, num_validation: windows to train on and, from other documents, to measure the loss on.
    """

    files: list[str] = field(default_factory=list)
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    limit: int | None = None
    length: int = 256
    num_train: int = 4000
    num_validation: int = 100


@dataclass
class RetrofitConfig:
    """How memory heals in a pretrained model whose own weights stay as they are.

    Attributes:
        revision: of a base on the hub; None is its main branch.
        dtype: of the weights; bfloat16 and float16 lose small steps, so prefer ``trainer.bf16`` with float32.
        batch_size: windows of one optimizer step.
        table_learning_rate: constant; the other rates warm up and fall along a cosine.
        margin: nats per token by which the healed loss may exceed the base's; None is 0.01 in mode "add" and
            0.05 in mode "replace", where the memory has to relearn what its layer's block did.
        dense_control: train a dense block of as many parameters on the same batches too, for comparison.
        num_background: training windows whose reads are counted as background, each of them one document.
    """

    revision: str | None = None
    dtype: str = "float32"
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 1e-3
    table_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    margin: float | None = None
    dense_control: bool = True
    num_background: int = 4000

    def __post_init__(self):
        check_choice("retrofit.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        check_at_least(1, "retrofit", self, "steps", "batch_size", "num_background")
        check_at_least(0, "retrofit", self, "learning_rate", "table_learning_rate", "weight_decay", "warmup_steps")
        check_at_least(0, "retrofit", self, "margin")


@dataclass
class RunConfig:
    """One run of train.py.

    Attributes:
        job: "pretrain", "retrofit" or "learn".
        output: folder to write.
        base: folder or hub id of a pretrained decoder without memory, for "retrofit".
        checkpoint: folder of a pretrained or healed memory model, for "learn".
        trainer: passed on to transformers.TrainingArguments; ``bf16: auto`` is settled when the config is loaded.
    """

    job: str = MISSING
    output: str = MISSING
    base: str | None = None
    checkpoint: str | None = None
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(layers=[2], num_keys=256))
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    text: TextConfig = field(default_factory=TextConfig)
    retrofit: RetrofitConfig = field(default_factory=RetrofitConfig)
    count: CountConfig = field(default_factory=CountConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    trainer: dict[str, Any] = field(default_factory=dict)


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides, check every name and type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown key, a value of the wrong type, or a required value left out.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config at {path}")
    malformed = [o for o in overrides if "=" not in o]
    if malformed:
        raise ValueError(f"override {malformed[0]!r} is not of the form section.key=value")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(RunConfig), OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        )
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}" + _where(error)) from error
    except Exception as error:  # yaml's own errors have no common base with OmegaConf's
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    config.trainer = resolve_precision(config.trainer)
    return config


def _where(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    return f" (at {key})" if key else ""


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe_fields(section: Any = None, prefix: str = "") -> list[str]:
    """One line ``section.key = default`` per setting of a run, for ``--help``."""
    section = RunConfig() if section is None else section
    lines = []
    for f in dataclasses.fields(section):
        default = getattr(section, f.name)
        if dataclasses.is_dataclass(default):
            lines += describe_fields(default, f"{prefix}{f.name}.")
        else:
            lines.append(f"{prefix}{f.name} = {'(required)' if default == MISSING else default}")
    return lines

"""The settings of jobs pretrain, pretrain_text and compare_pretraining; see sections.py."""

from dataclasses import dataclass, field
from typing import Any, Literal

from memlayer.checks import check_at_least, check_choice, check_choices, check_share

LossOn = Literal["all", "answer"]


@dataclass
class ModelConfig:
    """A Llama-architecture decoder built from scratch.

    Attributes:
        num_layers: decoder layers.
        width: of the hidden states.
        num_heads: attention heads.
        ffn_width: inner width of the feed-forward blocks.
        max_length: tokens of the longest sequence.
        vocab_size: tokens of the tokenizer, which is trained on the same text.
    """

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
class PretrainConfig:
    """Pretraining from nothing on the known facts.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences of one step, over all processes and micro-batches.
        learning_rate: of all but the tables; it warms up and falls along a cosine.
        table_learning_rate: of the tables; constant.
        weight_decay: of all matrices but the tables.
        warmup_steps: steps over which the learning rate rises.
        loss_on: tokens that are trained on.
        unseen_wordings: tell half of the known facts in the wordings too in which the others are asked only; false
            keeps those wordings out of pretraining, so that not even the sentences are known.
    """

    steps: int = 800
    batch_size: int = 128
    learning_rate: float = 2e-3
    table_learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    loss_on: LossOn = "answer"
    unseen_wordings: bool = True

    def __post_init__(self):
        check_at_least(1, "pretrain", self, "steps", "batch_size")
        check_at_least(0, "pretrain", self, "learning_rate", "table_learning_rate", "weight_decay", "warmup_steps")
        check_choices("pretrain", self)


@dataclass
class CountConfig:
    """What counts as one background document after pretraining.

    Attributes:
        sequences_per_document: so many consecutive sequences of pretraining text.
    """

    sequences_per_document: int = 8

    def __post_init__(self):
        check_at_least(1, "count", self, "sequences_per_document")


@dataclass
class ArchitectureConfig:
    """The architecture of a decoder that is built from scratch: any causal language model of transformers.

    Attributes:
        config: folder or hub id whose config.json is taken; None builds one of settings.model_type.
        settings: of the config, by the names that transformers gives them. The number of tokens is the tokenizer's
            unless vocab_size is here.
    """

    config: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class TokenizerConfig:
    """The tokenizer of a decoder that is built from scratch.

    Attributes:
        name: folder or hub id of one; None trains one on the text.
        vocab_size: tokens of one that is trained.
        characters: of the text that it is trained on, of each source as much as its weight says.
    """

    name: str | None = None
    vocab_size: int = 4096
    characters: int = 10_000_000

    def __post_init__(self):
        check_at_least(1, "tokenizer", self, "vocab_size", "characters")


@dataclass
class SourceConfig:
    """One source of text: files, a dataset or facts.

    Attributes:
        files: text, JSON or Parquet files.
        dataset: a dataset of the Hugging Face hub, streamed, in place of files.
        subset: the dataset's configuration, where it has several.
        split: the dataset's split.
        column: where a row holds its text.
        facts: the known facts of ``data`` in place of files, one document for each of their wordings.
        loss_on: of facts, tokens that are trained on.
        unseen_wordings: of facts, tell half of them in the wordings too in which the others are asked only.
        weight: its share of the tokens, over the sum of all weights; 0 leaves it out.
    """

    files: list[str] = field(default_factory=list)
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    facts: bool = False
    loss_on: LossOn = "all"
    unseen_wordings: bool = True
    weight: float = 1.0

    def check(self, name: str) -> None:
        """Refuse what does not fit together.

        Args:
            name: dotted, of this source.

        Raises:
            ValueError: it is no source or several, or a setting is out of range.
        """
        check_choices(name, self)
        check_at_least(0, name, self, "weight")
        named = [key for key in ("files", "dataset", "facts") if getattr(self, key)]
        if len(named) != 1:
            said = f"has both {' and '.join(named)}" if named else "has none of files, dataset and facts"
            raise ValueError(f"{name} {said}: a source is one of them")
        if self.subset is not None and self.dataset is None:
            raise ValueError(f"{name}.subset is {self.subset!r}, but no dataset is named")
        if not self.facts and (self.loss_on != "all" or not self.unseen_wordings):
            raise ValueError(f"{name} has loss_on or unseen_wordings, which are of facts")


@dataclass
class MixtureConfig:
    """The text that a decoder is pretrained on; see ``memlayer.data.mixture``.

    Attributes:
        sources: under a name of your own each, where the text comes from.
        length: tokens of a window.
        together: put several documents into a window, kept apart; else one in each, padded.
        buffer: documents that are shuffled with each other.
        held_out: share of the documents that is kept out of training to measure the loss on, and as much again to count
            the background on; which ones follows from what they say.
        num_validation: windows that the loss is measured on.
        num_background: documents at most, or pieces as long as a window, whose reads are counted at the end.
    """

    sources: dict[str, SourceConfig]
    length: int = 256
    together: bool = True
    buffer: int = 1000
    held_out: float = 0.01
    num_validation: int = 64
    num_background: int = 4000

    def __post_init__(self):
        check_at_least(2, "text", self, "length")
        check_at_least(1, "text", self, "buffer", "num_validation", "num_background")
        check_share("text.held_out", self.held_out, above_zero=True)
        if self.held_out >= 0.5:
            raise ValueError(f"text.held_out is {self.held_out}, must be below 0.5: it is held out twice")
        for name, source in self.sources.items():
            source.check(f"text.sources.{name}")
        if not any(source.weight for source in self.sources.values()):
            raise ValueError("text.sources has no source with a weight: there is nothing to train on")


@dataclass
class PretrainTextConfig:
    """Pretraining from nothing on text.

    Attributes:
        tokens: budget; as many optimizer steps as it has batches.
        batch_size: windows of one step, over all processes and micro-batches.
        learning_rate: of all but the tables; it warms up and falls along a cosine.
        table_learning_rate: of the tables; constant.
        weight_decay: of all matrices but the tables.
        warmup_steps: steps over which the learning rate rises.
    """

    tokens: int = 5_000_000
    batch_size: int = 32
    learning_rate: float = 2e-3
    table_learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100

    def __post_init__(self):
        check_at_least(1, "pretrain", self, "tokens", "batch_size")
        check_at_least(0, "pretrain", self, "learning_rate", "table_learning_rate", "weight_decay", "warmup_steps")


@dataclass
class ControlsConfig:
    """What a memory is pretrained beside, on the same batches.

    Attributes:
        config: file of a job pretrain_text, or a recipe by its name, whose memory is compared; the comparison decides
            its output and seed.
        settings: what else to change in it, each as section.key=value.
        names: the controls: dense, a gated block of as many FLOPs a token in the memory's place; dense_time, the same
            on as many batches as fit into the time that the memory's training takes; one_slot, with nothing to look
            up; shuffled, with addresses that know no token.
        seeds: how many seeds; the first is ``seed``.
        timed_steps: steps of each model, taken in turns, that say how many batches dense_time gets.
    """

    config: str
    settings: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=lambda: ["dense", "dense_time", "one_slot", "shuffled"])
    seeds: int = 1
    timed_steps: int = 20

    def __post_init__(self):
        check_at_least(1, "controls", self, "seeds", "timed_steps")
        for name in self.names:
            check_choice("controls.names", name, ("dense", "dense_time", "one_slot", "shuffled"))
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"controls.names are {self.names}: name each once")


@dataclass
class StatedConfig:
    """Facts that the text states, to ask pretrained models for; see ``memlayer.data.stated``.

    Attributes:
        questions: question sets or files of lessons, of which those are asked whose answer the text that was read has.
        facts: ask the known facts of the pretraining's ``data`` in the same way.
        num_questions: so many of them at most.
        num_wrong: wrong answers that the right one is chosen among, answers of other questions of the relation.
    """

    questions: list[str] = field(default_factory=list)
    facts: bool = False
    num_questions: int = 1000
    num_wrong: int = 9

    def __post_init__(self):
        check_at_least(1, "stated", self, "num_questions", "num_wrong")

    @property
    def any(self) -> bool:
        """Whether anything is to be asked."""
        return bool(self.questions or self.facts)

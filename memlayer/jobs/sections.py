"""The sections of a run's settings, one dataclass each; those of ``learn`` are learn_settings.py.

Their docstrings are what ``train.py --help`` shows, their types say what may be chosen, and they check their ranges.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from memlayer.checks import check_at_least, check_choice, check_choices, check_share
from memlayer.jobs.study_texts import KINDS

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
class TableConfig:
    """How several processes hold the tables while a run trains; see docs/several_devices.md.

    Attributes:
        shards: neighbouring processes that share a table by columns, each holding all slots and a part of every value;
            with 1 every process holds the whole table.
    """

    shards: int = 1

    def __post_init__(self):
        check_at_least(1, "table", self, "shards")


@dataclass
class LearnTableConfig(TableConfig):
    """Where the tables are that a run learns into, and how several processes hold them; see docs/several_devices.md.

    Attributes:
        shards: neighbouring processes that share a table by columns, each holding all slots and a part of every value;
            with 1 every process holds the whole table.
        place: loaded into memory; mapped, read row by row from its file, which stays as it is; or with auto mapped
            where the checkpoint is larger than the memory that is free.
    """

    place: Literal["auto", "loaded", "mapped"] = "auto"

    def __post_init__(self):
        super().__post_init__()
        check_choices("table", self)
        if self.shards > 1 and self.place == "mapped":
            raise ValueError(f"table.shards is {self.shards} and table.place mapped: a mapped table is not split")


@dataclass
class DataConfig:
    """Facts to train on or to teach.

    Attributes:
        facts: a JSON Lines file of facts; None is the built-in table.
        wordings: a JSON file of wordings; None is the built-in ones.
        num_known: known facts to pretrain on and to be asked about; None is all.
        num_new: new facts to teach; None is all of a file of one's own, and 100 of the built-in table.
        first_new: where among the new facts to start.
    """

    facts: str | None = None
    wordings: str | None = None
    num_known: int | None = None
    num_new: int | None = None
    first_new: int = 0


@dataclass
class LessonsConfig:
    """Lessons to teach in place of the facts of ``data``.

    Attributes:
        files: lessons, question sets or documents, see ``memlayer.data.lessons``, or hub:OWNER/NAME/SUBSET:SPLIT, a
            dataset of the Hugging Face hub; none is the facts of ``data``.
        chunk_words: about how many words of a document make a lesson.
        first: where among the lessons to start.
        number: lessons to teach; None is all from there on.
    """

    files: list[str] = field(default_factory=list)
    chunk_words: int = 200
    first: int = 0
    number: int | None = None

    def __post_init__(self):
        check_at_least(1, "lessons", self, "chunk_words", "number")
        check_at_least(0, "lessons", self, "first")


@dataclass
class PromptsConfig:
    """How the model is asked, in teaching and in evaluation.

    Attributes:
        style: plain asks in the frame; few_shot puts answered questions before; chat uses the tokenizer's template.
        frame: text around a question, which stands for {question} in it.
        end: text that ends an answer; None is the tokenizer's end token.
        shots: with style few_shot, a question set to take the answered questions from; None is four of our own.
        num_shots: answered questions before each, with style few_shot.
    """

    style: Literal["plain", "few_shot", "chat"] = "plain"
    frame: str = "{question}"
    end: str | None = None
    shots: str | None = None
    num_shots: int = 4

    def __post_init__(self):
        check_choices("prompts", self)
        check_at_least(1, "prompts", self, "num_shots")


def _as_a_base_model_is_asked() -> PromptsConfig:
    return PromptsConfig(style="few_shot", frame="Question: {question}\nAnswer:", end="\n\n")


@dataclass
class ProbesConfig:
    """What is measured beside what was taught; for eval.py a file of its own.

    Attributes:
        questions: question sets or files of lessons; each file is a probe.
        num_questions: of each file at most.
        slick_prompts: after how many sets of answered questions each question is asked before learning, to tell how
            well it is known (SliCK's HighlyKnown, MaybeKnown, WeaklyKnown, Unknown); 0 does not tell.
        slick_samples: answers drawn after each of these sets, beside the likeliest one.
        known_only: after learning ask only what came out right before; that is quicker, and gains are not seen.
        prompts: how they are asked.
        texts: text, JSON or Parquet files; each file is a probe.
        column: where a row of those holds its text.
        length: tokens of a window.
        num_windows: windows of each file.
        tasks: tasks of lm-evaluation-harness, by name; needs the package lm-eval.
        tasks_folder: task files of one's own.
        num_examples: examples of each task at most; None is all.
    """

    questions: list[str] = field(default_factory=list)
    num_questions: int = 500
    slick_prompts: int = 0
    slick_samples: int = 4
    known_only: bool = False
    prompts: PromptsConfig = field(default_factory=_as_a_base_model_is_asked)
    texts: list[str] = field(default_factory=list)
    column: str = "text"
    length: int = 256
    num_windows: int = 32
    tasks: list[str] = field(default_factory=list)
    tasks_folder: str | None = None
    num_examples: int | None = None

    def __post_init__(self):
        check_at_least(1, "", self, "num_questions", "num_windows", "num_examples")
        check_at_least(0, "", self, "slick_prompts", "slick_samples")
        if self.slick_prompts and self.prompts.style != "few_shot":
            raise ValueError(f"slick_prompts needs prompts.style=few_shot, which is {self.prompts.style}")
        check_at_least(2, "", self, "length")

    @property
    def any(self) -> bool:
        """Whether anything is to be measured."""
        return bool(self.questions or self.texts or self.tasks)


@dataclass
class MethodConfig:
    """One way to teach, in a comparison.

    Attributes:
        config: file of a learning run, or a recipe by its name; the comparison decides its output, checkpoint, seed
            and what it is taught.
        learning_rates: strengths to try.
        strengths: the same of a method that trains nothing: values of learn.min_share of retrieval, of learn.alpha
            of nearest and hebbian.
        settings: what else to change in it, each as section.key=value.
    """

    config: str
    learning_rates: list[float] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)

    def __post_init__(self):
        name = "strengths" if self.strengths and not self.learning_rates else "learning_rates"
        tried = getattr(self, name)
        if len(set(tried)) < max(1, len(tried)):
            raise ValueError(f"{name} of {self.config} are {tried}: name one or more, each once")


@dataclass
class CompareConfig:
    """What is taught in a comparison, and what is asked.

    Attributes:
        seeds: how many seeds; the first is ``seed``, and each teaches other facts or lessons.
        num_validation: facts or lessons on which each method's strength is chosen; 0 tries every strength on the test
            ones, where no choice is made.
        first_validation: where they start.
        num_test: facts or lessons on which the report stands, of each seed.
        first_test: where those of the first seed start; the next seed has the next ones. Of the built-in new facts
            those before 400 were used to find the recipes in configs/.
        every_strength: report every strength on test facts, not the chosen one alone.
        known_validation: first and last of the checkpoint's known facts that are asked beside validation facts.
        known_test: the same beside test facts.
        workers: processes of one thread each that teach at a time; 1 teaches in the run's own, with all its threads.
    """

    seeds: int = 1
    num_validation: int = 20
    first_validation: int = 0
    num_test: int = 40
    first_test: int = 400
    every_strength: bool = False
    known_validation: list[int] = field(default_factory=lambda: [0, 0])
    known_test: list[int] = field(default_factory=lambda: [0, 0])
    workers: int = 2

    def __post_init__(self):
        check_at_least(1, "compare", self, "seeds", "num_test", "workers")
        check_at_least(0, "compare", self, "num_validation", "first_validation", "first_test")
        for name in ("known_validation", "known_test"):
            span = getattr(self, name)
            if len(span) != 2 or not 0 <= span[0] <= span[1]:
                raise ValueError(f"compare.{name} is {span}, must be the first and the last of known facts")
        first, last = self.first_validation, self.first_validation + self.num_validation
        if first < self.first_test + self.seeds * self.num_test and self.first_test < last:
            raise ValueError(
                f"validation takes {first} to {last} and the test {self.first_test} and up: what chooses a strength "
                "may not be what is reported"
            )
        self.every_strength |= not self.num_validation


@dataclass
class AugmentConfig:
    """What a writer adds to each lesson.

    Attributes:
        revision: of a base on the hub; None is its main branch.
        kinds: what to write: statements, questions, explanations.
        texts: writings of each kind asked for a lesson; those that lost the thread are dropped.
        max_new_tokens: where a writing is cut.
        temperature: how far it wanders; 0 writes the likeliest text, once.
        top_p: share of the probability that tokens are drawn from.
        dtype: of the weights; auto is bfloat16 where this machine is fast in it.
    """

    revision: str | None = None
    kinds: list[str] = field(default_factory=lambda: ["statements", "questions"])
    texts: int = 8
    max_new_tokens: int = 80
    temperature: float = 0.8
    top_p: float = 0.95
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self):
        check_choices("augment", self)
        check_at_least(1, "augment", self, "texts", "max_new_tokens")
        check_at_least(0, "augment", self, "temperature", "top_p")
        if not self.kinds:
            raise ValueError(f"augment.kinds is empty: name some of {', '.join(KINDS)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"augment.kinds has {kind!r}, must be some of {', '.join(KINDS)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"augment.top_p is {self.top_p:g}, must be above 0 and at most 1")


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
class TextConfig:
    """The text that memory heals on, and that the loss is measured on; see ``memlayer.data.text``.

    Attributes:
        files: text, JSON or Parquet files.
        dataset: a dataset of the Hugging Face hub, streamed, in place of files.
        subset: the dataset's configuration, where it has several.
        split: the dataset's split.
        builtin_facts: the sentences of the built-in known facts in place of files, to try things out.
        column: where a row holds its text.
        limit: documents to read at most; None is as many as needed.
        length: tokens of a window.
        num_train: windows to train on.
        num_validation: windows of other documents, to measure the loss on.
    """

    files: list[str] = field(default_factory=list)
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    builtin_facts: bool = False
    column: str = "text"
    limit: int | None = None
    length: int = 256
    num_train: int = 4000
    num_validation: int = 100

    def __post_init__(self):
        check_at_least(1, "text", self, "limit", "num_train", "num_validation")
        check_at_least(2, "text", self, "length")
        sources = {"files": self.files, "dataset": self.dataset, "builtin_facts": self.builtin_facts}
        named = [f"text.{name}" for name, source in sources.items() if source]
        if len(named) > 1:
            which = ", so write text.builtin_facts=false" if self.builtin_facts else ""
            raise ValueError(f"{' and '.join(named)} are both set: text comes from one of them{which}")
        if not named:
            raise ValueError(
                "no text to heal on: name text.files or text.dataset, or set text.builtin_facts=true to try things out"
            )


@dataclass
class RetrofitConfig:
    """How memory heals in a pretrained model whose own weights stay as they are.

    Attributes:
        revision: of a base on the hub; None is its main branch.
        dtype: of the weights; bfloat16 and float16 lose small steps, so prefer ``trainer.bf16`` with float32.
        steps: optimizer steps; with 0 memory is attached, its background is counted, and nothing is trained.
        batch_size: windows of one step, over all processes and micro-batches.
        learning_rate: of all but the tables; it warms up and falls along a cosine.
        table_learning_rate: of the tables; constant.
        weight_decay: of all matrices but the tables.
        warmup_steps: steps over which the learning rate rises.
        margin: nats per token by which the healed loss may exceed the base's; None is 0.01 in mode "add" and
            0.05 in mode "replace", where the memory has to relearn what its layer's block did.
        dense_control: train a dense block of as many FLOPs a token on the same batches too, for comparison.
        num_background: training windows whose reads are counted as background, each of them one document.
        background_lessons: files of lessons or question sets whose examples are counted as background too, asked as
            ``prompts`` says, each of them one document. Without any, the slots of a prompt's own words look rare, and
            teaching in that prompt writes into them.
    """

    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 1e-3
    table_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    margin: float | None = None
    dense_control: bool = True
    num_background: int = 4000
    background_lessons: list[str] = field(default_factory=list)

    def __post_init__(self):
        check_choices("retrofit", self)
        check_at_least(1, "retrofit", self, "batch_size", "num_background")
        check_at_least(0, "retrofit", self, "steps", "learning_rate", "table_learning_rate", "weight_decay")
        check_at_least(0, "retrofit", self, "warmup_steps", "margin")

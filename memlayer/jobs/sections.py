"""Sections of settings that several jobs have, and those of augment and retrofit: one dataclass each.

Those of the other jobs are learn_settings.py, pretrain_settings.py and compare_settings.py. Their docstrings are what
``train.py --help`` shows, their types say what may be chosen, and they check their ranges.
"""

from dataclasses import dataclass, field
from typing import Literal

from memlayer.checks import check_at_least, check_choices
from memlayer.jobs.study_texts import KINDS


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

"""What a run is told: one dataclass per job, whose sections are in sections.py and in the files of settings beside it.

Which settings there are follows from the job and the method, so one that would do nothing is refused. The resolved
configuration is saved with every run.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memlayer.checks import check_at_least, check_choices
from memlayer.evaluation.rows import CONTROL
from memlayer.jobs import recipes, typed, written
from memlayer.jobs.compare_settings import CompareConfig, MethodConfig
from memlayer.jobs.learn_settings import ANY_LEARN, SparseMemoryConfig
from memlayer.jobs.pretrain_settings import (
    ArchitectureConfig,
    ControlsConfig,
    CountConfig,
    MixtureConfig,
    ModelConfig,
    PretrainConfig,
    PretrainTextConfig,
    StatedConfig,
    TokenizerConfig,
)
from memlayer.jobs.sections import (
    AugmentConfig,
    DataConfig,
    LearnTableConfig,
    LessonsConfig,
    ProbesConfig,
    PromptsConfig,
    RetrofitConfig,
    TableConfig,
    TextConfig,
)
from memlayer.jobs.trainer_settings import TYPES, check_trainer
from memlayer.layers.config import MemoryConfig
from memlayer.machine import resolve_precision


@dataclass(kw_only=True)
class RunConfig:
    """What every job is told.

    Attributes:
        job: what to do: pretrain, pretrain_text, compare_pretraining, retrofit, augment, learn or compare.
        output: folder to write.
        seed: of all that is drawn.
    """

    job: str
    output: str
    seed: int = 0

    def __post_init__(self):
        check_choices("", self)
        check_at_least(0, "", self, "seed")


@dataclass(kw_only=True)
class TrainingRun(RunConfig):
    """What every job that trains is told.

    Attributes:
        trainer: those of transformers.TrainingArguments that the job leaves open; save_strategy is no, logging_steps
            100 and report_to none unless they are set here, and bf16=auto follows the machine.
    """

    table: TableConfig = field(default_factory=TableConfig)
    trainer: dict[str, Any] = field(default_factory=dict, metadata={"types": TYPES})

    def __post_init__(self):
        super().__post_init__()
        check_trainer(self.job, self.trainer)


def _memory() -> MemoryConfig:
    return MemoryConfig(layers=[2], num_keys=256)


@dataclass(kw_only=True)
class PretrainRun(TrainingRun):
    """Pretrain a decoder with memory from nothing, on known facts."""

    job: Literal["pretrain"] = "pretrain"
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=_memory)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    count: CountConfig = field(default_factory=CountConfig)


@dataclass(kw_only=True)
class PretrainTextRun(TrainingRun):
    """Pretrain a decoder with memory from nothing, on text of one source or several."""

    job: Literal["pretrain_text"] = "pretrain_text"
    model: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    memory: MemoryConfig = field(default_factory=_memory)
    data: DataConfig = field(default_factory=DataConfig)
    text: MixtureConfig
    pretrain: PretrainTextConfig = field(default_factory=PretrainTextConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.data != DataConfig() and not any(source.facts for source in self.text.sources.values()):
            raise ValueError("settings of data are there, and no source of the text is of facts")


@dataclass(kw_only=True)
class ComparePretrainingRun(RunConfig):
    """Pretrain a decoder with memory and its controls on the same batches, and report what the memory earned."""

    job: Literal["compare_pretraining"] = "compare_pretraining"
    controls: ControlsConfig
    stated: StatedConfig = field(default_factory=StatedConfig)

    def __post_init__(self):
        super().__post_init__()
        try:
            recipes.find(self.controls.config, "pretrain_text")
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"controls.config is {self.controls.config}: {error}") from error


@dataclass(kw_only=True)
class RetrofitRun(TrainingRun):
    """Retrofit memory into a pretrained decoder and heal it on text.

    Attributes:
        base: folder or hub id of a pretrained decoder without memory.
    """

    job: Literal["retrofit"] = "retrofit"
    base: str
    memory: MemoryConfig = field(default_factory=_memory)
    text: TextConfig
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    retrofit: RetrofitConfig = field(default_factory=RetrofitConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.memory.control == "dense":
            raise ValueError(
                "memory.control is 'dense': a retrofit trains that beside the memory, by retrofit.dense_control"
            )
        if not self.retrofit.steps and self.memory.start != "values_zero":
            raise ValueError(
                f"retrofit.steps is 0, and memory of mode {self.memory.mode!r} and start {self.memory.start!r} has to "
                "heal: with memory.mode=add and memory.start=values_zero it need not"
            )


@dataclass(kw_only=True)
class AugmentRun(RunConfig):
    """Let a language model write study texts about lessons: more wordings to teach them in.

    Attributes:
        base: folder or hub id of any causal language model, the one to be taught or a better writer.
    """

    job: Literal["augment"] = "augment"
    base: str
    lessons: LessonsConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self):
        super().__post_init__()
        if not self.lessons.files:
            raise ValueError("lessons.files is empty: name the lessons to write about")


@dataclass(kw_only=True)
class LearnRun(TrainingRun):
    """Teach a decoder with memory new facts or lessons.

    Attributes:
        checkpoint: folder of a pretrained or healed memory model.
    """

    job: Literal["learn"] = "learn"
    checkpoint: str
    table: LearnTableConfig = field(default_factory=LearnTableConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lessons: LessonsConfig = field(default_factory=LessonsConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    learn: ANY_LEARN = field(default_factory=SparseMemoryConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.lessons.files and self.data != DataConfig():
            raise ValueError("lessons.files and settings of data are both there: a run teaches lessons or facts")


@dataclass(kw_only=True)
class CompareRun(RunConfig):
    """Teach the same with several methods at several strengths, over seeds, and report what each forgot.

    Attributes:
        checkpoint: folder of a pretrained or healed memory model.
        methods: under a name of your own each, the methods to compare.
        note: what whoever reads the result should know of it; it is printed first, and stands in the report.
    """

    job: Literal["compare"] = "compare"
    checkpoint: str
    methods: dict[str, MethodConfig]
    note: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    lessons: LessonsConfig = field(default_factory=LessonsConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)

    def __post_init__(self):
        super().__post_init__()
        if not self.methods:
            raise ValueError("methods is empty: name what to compare")
        for name, method in self.methods.items():
            if name == CONTROL or Path(name).name != name:
                raise ValueError(
                    f"methods.{name}: a method may be named otherwise, but not {CONTROL!r} and not with a slash"
                )
            try:
                recipes.find(method.config, "learn")
            except (FileNotFoundError, ValueError) as error:
                raise ValueError(f"methods.{name}.config is {method.config}: {error}") from error
        for key in ("num_new", "first_new"):
            if getattr(self.data, key):
                raise ValueError(f"data.{key} is set: compare.first_test and compare.num_test say what is taught")
        if self.lessons.first or self.lessons.number:
            raise ValueError("lessons.first or lessons.number is set: compare.first_test and compare.num_test decide")
        if self.lessons.files and self.data != DataConfig():
            raise ValueError("lessons.files and settings of data are both there: a run teaches lessons or facts")


ANY_RUN = PretrainRun | PretrainTextRun | ComparePretrainingRun | RetrofitRun | AugmentRun | LearnRun | CompareRun


def facts_told(run: RunConfig | None) -> tuple[DataConfig, bool] | None:
    """The known facts that a run pretrained on, and whether in half of the unseen wordings too; None if it did not."""
    if isinstance(run, PretrainRun):
        return run.data, run.pretrain.unseen_wordings
    if isinstance(run, PretrainTextRun):
        told = [source.unseen_wordings for source in run.text.sources.values() if source.facts and source.weight]
        return (run.data, any(told)) if told else None
    return None


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides, check every name and type.

    Of an override what follows the first = is the value. A field of text takes it as it stands, with a leading ~
    made the home folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown key, one of another job or method, a value of the wrong type, or a required one left
            out.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config at {path}")
    try:
        tree = written.parse(Path(path).read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError(f"the file is {written.shown(tree)}, must be sections of key: value")
        for each in overrides:
            name, equals, value = each.partition("=")
            if not equals or not name.strip():
                raise ValueError(f"override {each!r} is not of the form section.key=value")
            written.override(tree, name, value)
        config = typed.read(ANY_RUN, tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if isinstance(config, TrainingRun):
        config.trainer = resolve_precision(config.trainer)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back."""
    return written.write(config)

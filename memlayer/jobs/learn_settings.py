"""The section ``learn`` of a run's settings: one dataclass for each method that trains."""

from dataclasses import dataclass, field
from typing import Literal

from memlayer.checks import check_at_least, check_choices, check_share
from memlayer.data.prompts import LESSON
from memlayer.jobs.pretrain_settings import LossOn
from memlayer.jobs.store_settings import AnyMethodConfig, HebbianConfig, NearestConfig, RetrievalConfig


@dataclass
class ReplayConfig:
    """Replay: each step sees some examples of what should be kept, beside its lesson.

    Attributes:
        files: lessons, question sets or documents to replay.
        known: first and last of the known facts that the checkpoint was pretrained on to replay; those that a probe
            asks for are better left out.
        generated: texts that the untouched model writes itself to be replayed.
        length: tokens of such a text at most.
        keep: so many of all these are replayed, as evenly as can be of each relation, of files and of generated texts;
            None is all.
        keep_by: random; herding, whose mean is near that of all; or teal, the most typical of each cluster.
        batch_size: examples beside each micro-batch.
        weight: of their loss beside the lesson's.
        target: text trains on the examples; base holds the model to what it said of them before learning; gradient
            adds nothing, but a step may not go against the examples' gradient (A-GEM).
        loss_on: tokens that count; of a text, all.
    """

    files: list[str] = field(default_factory=list)
    known: list[int] = field(default_factory=lambda: [0, 0])
    generated: int = 0
    length: int = 64
    keep: int | None = None
    keep_by: Literal["random", "herding", "teal"] = "random"
    batch_size: int = 8
    weight: float = 1.0
    target: Literal["text", "base", "gradient"] = "text"
    loss_on: LossOn = "all"

    def __post_init__(self):
        prefix = "learn.terms.replay"
        check_choices(prefix, self)
        check_at_least(1, prefix, self, "length", "keep", "batch_size")
        check_at_least(0, prefix, self, "generated", "weight")
        if len(self.known) != 2 or not 0 <= self.known[0] <= self.known[1]:
            raise ValueError(f"{prefix}.known is {self.known}, must be the first and the last of known facts")
        if not self.files and not self.generated and self.known[0] == self.known[1]:
            raise ValueError(f"{prefix} has nothing to replay: name files, known facts or a number of generated texts")


@dataclass
class NGramConfig:
    """N-gram regulariser: phrasings of the lessons may not become much likelier than they were.

    Attributes:
        n: tokens of an n-gram.
        margin: how much more probable, a token in the geometric mean, an n-gram may become for nothing.
        weight: of the penalty beside the lesson's loss.
        exempt_answers: whether n-grams with a token of an answer are left out; then the rest has to be trained on,
            with loss_on all.
    """

    n: int = 4
    margin: float = 0.1
    weight: float = 1.0
    exempt_answers: bool = True

    def __post_init__(self):
        check_at_least(1, "learn.terms.ngram", self, "n")
        check_at_least(0, "learn.terms.ngram", self, "margin", "weight")
        if self.margin >= 1:
            raise ValueError(f"learn.terms.ngram.margin is {self.margin}, must be below 1: it is a probability")


@dataclass
class TrustRegionConfig:
    """Trust region: the more a number matters to texts that the untouched model writes, the less it may move.

    Attributes:
        generated: how many such texts tell what matters; a backward pass each.
        length: tokens of such a text at most.
        bound: how far a number may move is this over the root of its row's width, halved with each bit of information.
        quantile: of a parameter's numbers, the share that may move freely, about.
    """

    generated: int = 64
    length: int = 64
    bound: float = 1.0
    quantile: float = 0.5

    def __post_init__(self):
        prefix = "learn.terms.trust_region"
        check_at_least(1, prefix, self, "generated", "length")
        if self.bound <= 0 or not 0 <= self.quantile <= 1:
            raise ValueError(
                f"{prefix} has bound {self.bound} and quantile {self.quantile}: the first must be above 0, the second "
                "between 0 and 1"
            )


@dataclass
class ContextConfig:
    """Context: a lesson is taught as what the untouched model says when it has the lesson's text before it.

    Before a question or a statement stand the lesson's texts, or where it has none a statement of it, another one.

    Attributes:
        frame: what stands before a prompt and all that frames it, with the lesson, less a full stop at its end, in the
            place of ``{lesson}``. A chat begins with it.
        weight: of the divergence from what the untouched model says.
        lesson_weight: of the lesson's own loss beside it; 0 teaches by the divergence alone, and then a text, which
            nothing stands before, is not learned itself.
        only_right: whether the divergence counts only where the untouched model gives the answer after the lesson; it
            teaches the wrong thing elsewhere.
    """

    frame: str = LESSON + ".\n\n"
    weight: float = 1.0
    lesson_weight: float = 1.0
    only_right: bool = True

    def __post_init__(self):
        check_at_least(0, "learn.terms.context", self, "weight", "lesson_weight")
        if self.frame.count(LESSON) != 1:
            raise ValueError(f"learn.terms.context.frame is {self.frame!r}, must hold {LESSON} once")


@dataclass
class TermsConfig:
    """What each step heeds beside its lesson, with any method; a term that is not named is not there."""

    replay: ReplayConfig | None = None
    ngram: NGramConfig | None = None
    trust_region: TrustRegionConfig | None = None
    context: ContextConfig | None = None


@dataclass
class MistConfig:
    """MIST before learning: tune the few numbers that tell the lessons apart, freeze them, then teach by any method.

    Attributes:
        density: share of each matrix's numbers that is tuned.
        drop: share of these that each step leaves out, drawn anew each step.
        epochs: passes over the lessons, after the one that scores.
        rate: learning rate of this tuning, which is SGD.
        momentum: of this tuning.
        paper_code: tune as the paper's released code does, which moves every number a little; its density is 0.1.
    """

    density: float = 0.05
    drop: float = 0.9
    epochs: int = 19
    rate: float = 1e-4
    momentum: float = 0.9
    paper_code: bool = False

    def __post_init__(self):
        prefix = "learn.mist"
        check_at_least(1, prefix, self, "epochs")
        check_at_least(0, prefix, self, "rate")
        check_share(f"{prefix}.density", self.density, above_zero=True)
        check_share(f"{prefix}.drop", self.drop)
        check_share(f"{prefix}.momentum", self.momentum)


@dataclass(kw_only=True)
class LearnConfig(AnyMethodConfig):
    """How new facts or lessons are taught, with any method that trains.

    Attributes:
        learning_rate: of the method's optimizer; constant.
        steps_per_fact: optimizer steps on a fact or lesson.
        order: depth_first takes all steps of a lesson before the next one; rounds takes one step of each, and again.
        batch_size: examples of a lesson that a step trains on, the next ones in its next step; None is all of them.
        loss_on: tokens that are trained on; of a text, all.
        skip_below: a step is left out where its loss is below so many nats a token: the lesson is learned. In rounds it
            is taught again when it has slipped. None leaves out none.
        terms: what each step heeds beside its lesson.
        mist: what is tuned before the first step; nothing where it is not named.
    """

    learning_rate: float
    steps_per_fact: int = 5
    order: Literal["depth_first", "rounds"] = "depth_first"
    batch_size: int | None = None
    loss_on: LossOn = "answer"
    skip_below: float | None = None
    terms: TermsConfig = field(default_factory=TermsConfig)
    mist: MistConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, "learn", self, "steps_per_fact", "batch_size")
        check_at_least(0, "learn", self, "learning_rate", "skip_below")

    @property
    def in_words(self) -> str:
        """How strongly the run taught."""
        return f"lr {self.learning_rate:g}, {self.steps_per_fact} steps a fact"


@dataclass
class SparseMemoryConfig(LearnConfig):
    """Sparse memory finetuning: a step changes a few rows of the memory and nothing else.

    Attributes:
        num_rows: slots of a table that one step may change.
        idf_power: 1 ranks slots as the paper does; more avoids those that background text reads.
        positions: whose reads count: all positions, as in the paper; those that name the lesson's subject, which its
            wordings have in common, so that a wording it was not taught in reads the rows too; or those that predict
            the answer. A lesson whose subject is not known counts all.
        subject_tokens: with positions=subject, so many tokens at the end of the name count, where it has been read as a
            whole; None is all of them.
        protect: how many background documents a row counts as read by, for each lesson that wrote it, when another
            one chooses. 0 is the paper's rule; as many as there are documents, or more, keeps the rows of lessons
            apart, so that one can be deleted entirely.
        max_norm: how long the change of a row may become; None is no bound, as in the paper.
        reads: sum counts how often a step's examples read a slot, as in the paper; wordings, how many of them read it;
            minimum, how often the one that reads it least, so that only slots which all its wordings share are written.
        select: how slots are ranked: tf_idf is the paper's rule; kl and kl_documents compare with the background's
            reads or document frequencies, and know no idf_power; gradient puts the length of a slot's gradient in the
            place of its reads, and takes twice the time; random is a control.
        damping: how much shorter a row's step becomes by how often background text reads it: with 1 a slot that it
            reads as often as the mean slot takes half a step, one that it never reads a whole one. 0 is the paper's
            rule. Rows that lessons wrote count, for another one, as read by protect more documents.
        optimizer: sgd is the paper's, without momentum.
        rate_unit: optimizer takes learning_rate as it is; lessons, as a part of the rate at which the first step takes
            the whole loss of the median lesson away, if that falls in a straight line. It carries over between models;
            the rate that it comes to is told and kept.
    """

    method: Literal["sparse_memory"] = "sparse_memory"
    learning_rate: float = 10.0
    num_rows: int = 400
    idf_power: float = 8.0
    positions: Literal["all", "subject", "answer"] = "all"
    subject_tokens: int | None = None
    protect: int = 10
    max_norm: float | None = None
    reads: Literal["sum", "wordings", "minimum"] = "sum"
    select: Literal["tf_idf", "kl", "kl_documents", "gradient", "random"] = "tf_idf"
    damping: float = 0.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    rate_unit: Literal["optimizer", "lessons"] = "optimizer"

    def __post_init__(self):
        super().__post_init__()
        if self.rate_unit == "lessons" and self.optimizer != "sgd":
            raise ValueError(
                f"learn.rate_unit is lessons and learn.optimizer {self.optimizer}, whose steps are as long as its rate "
                "says: leave one out"
            )
        if self.mist is not None and self.mist.paper_code:
            raise ValueError(
                "learn.mist.paper_code moves product keys, with which the background was counted: leave it out"
            )
        check_at_least(1, "learn", self, "num_rows", "subject_tokens")
        check_at_least(0, "learn", self, "idf_power", "protect", "max_norm", "damping")
        if self.subject_tokens is not None and self.positions != "subject":
            raise ValueError(
                f"learn.subject_tokens is {self.subject_tokens}, but learn.positions is {self.positions}, which counts "
                "more than names"
            )


@dataclass
class DenseMemoryConfig(LearnConfig):
    """All values: every row of the memory that a step reads may move, and nothing else.

    Attributes:
        optimizer: adam, or sgd without momentum.
    """

    method: Literal["dense_memory"] = "dense_memory"
    learning_rate: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"


@dataclass
class FullConfig(LearnConfig):
    """Full finetuning: every parameter.

    Attributes:
        optimizer: adamw, or sgd without momentum, which needs a far higher rate.
    """

    method: Literal["full"] = "full"
    learning_rate: float = 3e-5
    optimizer: Literal["adamw", "sgd"] = "adamw"


@dataclass
class LoraConfig(LearnConfig):
    """LoRA on every linear layer, AdamW.

    Attributes:
        merge: whether the updates go into the weights at the end; false keeps them beside the model, as peft's folder
            adapter.
        lora_rank: rank of the low-rank updates.
        lora_alpha: an update is scaled by lora_alpha / lora_rank.
    """

    method: Literal["lora"] = "lora"
    learning_rate: float = 1e-4
    lora_rank: int = 32
    lora_alpha: float = 32.0
    merge: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.terms.trust_region is not None:
            raise ValueError("learn.terms.trust_region holds a model's own weights, learn.method=lora steps others")
        if self.mist is not None and not self.merge:
            raise ValueError("learn.merge is false and learn.mist tunes the weights: the updates would be of no model")
        check_at_least(1, "learn", self, "lora_rank")
        check_at_least(0, "learn", self, "lora_alpha")


@dataclass
class SparseMaskConfig(LearnConfig):
    """A fixed choice of single numbers of the linear layers' matrices, made before training.

    Attributes:
        score: which numbers: random ones, those of the greatest magnitude, or those with the largest gradients of the
            loss of what is taught (fisher), or of the loss that pulls a lesson's wordings together (infonce).
        density: share of each matrix's numbers that may change.
        drop: share of them that each step leaves out, drawn anew each step.
        optimizer: sgd, adam or adamw; none of them moves what was not chosen.
        momentum: of sgd.
    """

    method: Literal["sparse_mask"] = "sparse_mask"
    learning_rate: float = 3e-4
    score: Literal["random", "magnitude", "fisher", "infonce"] = "random"
    density: float = 0.05
    drop: float = 0.0
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    momentum: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_share("learn.density", self.density, above_zero=True)
        check_share("learn.drop", self.drop)
        check_share("learn.momentum", self.momentum)
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"learn.momentum is {self.momentum} and learn.optimizer {self.optimizer}: it is of sgd")


@dataclass
class RidgeConfig(LearnConfig):
    """Ridge over rows: by how much the memory's read should change is learned, and the rows follow by least squares.

    It takes one memory layer. Its steps move no row, so that lessons do not see each other, in whatever order they are
    taught; a folder of the run keeps what it takes to leave one out again to the bit.

    Attributes:
        num_rows: slots that a lesson may bring.
        idf_power: of how little background text reads them.
        positions: whose reads change: those that predict the answer; those that name the lesson's subject, from where
            attention carries the change on; or all.
        ridge: what a row's change costs, beside what a position misses of what it wants.
        background_tokens: so many tokens of ordinary text count as positions whose reads should stay as they are.
        optimizer: of the wanted changes: adam, or sgd without momentum.
    """

    method: Literal["ridge"] = "ridge"
    learning_rate: float = 1.0
    num_rows: int = 100
    idf_power: float = 8.0
    positions: Literal["answer", "subject", "all"] = "subject"
    ridge: float = 0.01
    background_tokens: float = 0.0
    optimizer: Literal["adam", "sgd"] = "adam"

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, "learn", self, "num_rows")
        check_at_least(0, "learn", self, "idf_power", "background_tokens")
        if not self.ridge > 0:
            raise ValueError(f"learn.ridge is {self.ridge}, must be above 0: without it rows are not determined")
        if self.batch_size is not None:
            raise ValueError(
                f"learn.batch_size is {self.batch_size}: ridge takes all examples of a lesson in each step"
            )
        if self.mist is not None and self.mist.paper_code:
            raise ValueError(
                "learn.mist.paper_code moves product keys, with which the background was counted: leave it out"
            )
        if self.terms.replay is not None:
            raise ValueError("learn.terms.replay asks the model what it would forget, and no step of ridge moves it")
        if self.terms.trust_region is not None:
            raise ValueError(
                "learn.terms.trust_region holds a model's own weights, learn.method=ridge steps what reads should be"
            )


ANY_LEARN = (
    SparseMemoryConfig
    | DenseMemoryConfig
    | FullConfig
    | LoraConfig
    | SparseMaskConfig
    | RidgeConfig
    | RetrievalConfig
    | NearestConfig
    | HebbianConfig
)

"""The settings of job compare; see sections.py."""

from dataclasses import dataclass, field

from memlayer.checks import check_at_least


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

"""A buffer of examples to replay, and four policies that say which it keeps.

*reservoir* keeps an even sample of all that ever came, whatever its group. The others give each group an even part of
the buffer and order its examples once, the first to keep first; when further groups come, each keeps the beginning of
its order. *random* orders by a seed, *herding* so that the mean of those kept stays near the group's, *teal* by how
typical they are (teal.py). What an example is, and what its features are, is the caller's: a lesson, its hidden state.

Sources: reservoir sampling, Vitter 1985 (algorithm R); herding, Rebuffi et al., arXiv:1611.07725, algorithm 4, here on
features as they are given; keeping a prefix, arXiv:2407.00673. Ours: one class for all four.

Shapes: N examples, D features.
"""

import random
from collections.abc import Hashable, Sequence

import numpy as np

from memlayer.methods.teal import even_shares, teal_order

POLICIES = ("reservoir", "random", "herding", "teal")


def herding_order(features_ND: np.ndarray, budget: int) -> list[int]:
    """Examples whose mean stays as near to the mean of all as can be, one after the other; of equal ones the first."""
    features_ND = np.asarray(features_ND, dtype=np.float64)
    left, chosen, total_D = list(range(len(features_ND))), [], np.zeros(features_ND.shape[1])
    while left and len(chosen) < budget:
        means_ND = (total_D + features_ND[left]) / (len(chosen) + 1)
        best = left.pop(int(((means_ND - features_ND.mean(0)) ** 2).sum(1).argmin()))
        chosen.append(best)
        total_D = total_D + features_ND[best]
    return chosen


class ReplayBuffer:
    """At most ``budget`` examples.

    Args:
        budget: examples that are kept.
        policy: one of POLICIES.
        seed: of what is drawn, by k-means too.

    Raises:
        ValueError: the budget is below 1, or another policy.
    """

    def __init__(self, budget: int, policy: str = "reservoir", seed: int = 0):
        if budget < 1 or policy not in POLICIES:
            raise ValueError(f"budget={budget}, policy={policy!r}: at least 1, and one of {', '.join(POLICIES)}")
        self.budget, self.policy, self.seed = budget, policy, seed
        self._draw, self._seen = random.Random(seed), 0
        self._reservoir: list = []
        self._of_group: dict[Hashable, list] = {}

    @property
    def examples(self) -> list:
        """What is kept, group by group."""
        return self._reservoir or [example for kept in self._of_group.values() for example in kept]

    def add(self, group: Hashable, examples: Sequence, features_ND: np.ndarray | None = None) -> None:
        """Take what there is room for of a group's examples, and drop of the others what there is none for.

        Args:
            group: whose examples these are; new, unless the policy is reservoir.
            features_ND: of each example, for herding and teal.

        Raises:
            ValueError: the group is there already, or features are missing or not one an example.
        """
        if self.policy == "reservoir":
            return self._sample(examples)
        if group in self._of_group:
            raise ValueError(f"group {group!r} is in the buffer already: give all its examples at once")
        needed = self.policy in ("herding", "teal")
        if needed and (features_ND is None or len(features_ND) != len(examples)):
            found = "none" if features_ND is None else len(features_ND)
            raise ValueError(f"policy {self.policy!r} needs features of {len(examples)} examples, there are {found}")
        sizes = {each: len(kept) for each, kept in self._of_group.items()} | {group: len(examples)}
        share = even_shares(sizes, self.budget)
        self._of_group[group] = [examples[place] for place in self._order(len(examples), share[group], features_ND)]
        self._of_group = {each: kept[: share[each]] for each, kept in self._of_group.items()}

    def sample(self, count: int, draw: random.Random) -> list:
        """Examples drawn evenly without return; all, where there are fewer."""
        return draw.sample(self.examples, min(count, len(self.examples)))

    def _order(self, number: int, share: int, features_ND: np.ndarray | None) -> list[int]:
        if self.policy == "random":
            return self._draw.sample(range(number), share)
        if self.policy == "herding":
            return herding_order(features_ND, share)
        return teal_order(features_ND, share, seed=self.seed)

    def _sample(self, examples: Sequence) -> None:
        for example in examples:
            self._seen += 1
            if len(self._reservoir) < self.budget:
                self._reservoir.append(example)
            elif (place := self._draw.randrange(self._seen)) < self.budget:
                self._reservoir[place] = example

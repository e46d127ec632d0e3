"""Nearest neighbours: the next token of the lessons' states near to the model's own is mixed into what it says.

After kNN-LM (Khandelwal et al., arXiv:1911.00172, section 2: a distribution over the neighbours' tokens by a
softmax of distances, mixed with the model's by one weight), and the control beside Memory Transformer Network
(arXiv:2210.04485), whose trained reader of neighbours is left out. Ours: the states are those that go into the output
head, not into the last feed-forward block; they are taken less their mean and at unit length, so that distances are
cosines, and cosines alike from model to model; a temperature; and the gate, without which a store of a few facts would
speak at every position of every text.

Shapes as in neighbours.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from memlayer.data.lessons import Lesson
from memlayer.evaluation.qa import evaluating
from memlayer.methods.neighbours import NeighbourStore
from memlayer.methods.terms import unheard


class Nearest(NeighbourStore):
    """A ``Store`` whose ``alpha`` is the share of the neighbours in what is said, from 0 to below 1."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        lessons: Sequence[Lesson],
        encoded: Sequence[Sequence[dict]],
        settings,
        progress: Callable[[int], object] = unheard,
    ) -> Self:
        """Read the lessons once, and keep the states at their answers.

        Raises:
            ValueError: the model changes its logits after the output head, where these would be changed with them.
        """
        _check_head(model, encoded[0][0]["input_ids"])
        return super().of(model, lessons, encoded, settings, progress)

    def rule(
        self, head: nn.Module, logits_TC: Tensor, states_TD: Tensor, similarity_TK: Tensor, place_TK: Tensor
    ) -> Tensor:
        """The model's distribution and the neighbours', mixed."""
        return mixed(logits_TC, similarity_TK, self.kept.tokens_M[place_TK], self.alpha, self.temperature)


def mixed(logits_TC: Tensor, similarity_TK: Tensor, tokens_TK: Tensor, alpha: float, temperature: float) -> Tensor:
    """Logits of (1 - alpha) of the model's distribution and alpha of the neighbours'.

    A neighbour counts with softmax(similarity / temperature). With alpha 0 the logits are what they were, to the bit.

    Args:
        alpha: at least 0 and below 1.
        temperature: above 0.
    """
    weights_TK = (similarity_TK / temperature).softmax(-1)
    theirs_TC = torch.zeros_like(logits_TC).scatter_add(1, tokens_TK, weights_TK)
    share = math.log(alpha) if alpha else -math.inf
    total_T1 = logits_TC.logsumexp(-1, keepdim=True)
    return torch.logaddexp(logits_TC + math.log1p(-alpha), total_T1 + share + theirs_TC.log())


def _check_head(model: nn.Module, ids: Sequence[int]) -> None:
    heard: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _head, _inputs, logits: heard.append(logits))
    try:
        with evaluating(model), torch.no_grad():
            said = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    finally:
        handle.remove()
    if not torch.equal(said.float(), heard[0].float()):
        raise ValueError(
            f"learn.method=nearest mixes distributions, and {type(model).__name__} changes its logits after the "
            "output head: learn.method=hebbian does not depend on that"
        )

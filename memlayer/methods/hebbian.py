"""Hebbian output head: the lessons' states near to the model's own are wired into the head's rows for one answer.

After Mi, Lin and Faltings (arXiv:2108.12596), who retrieve similar representations and wire them into the parameters of
the output layer by a Hebbian rule, without gradients, anew for each answer. Their exact rule is not known to us; this
one is ours, in the style of the Hebbian softmax (Rae et al., arXiv:1803.10049): the row of a neighbour's token turns
towards the states that it followed and keeps its length. With s_k a neighbour's strength, exp(similarity / temperature)

    row_v = (1 - a_v) w_v + a_v |w_v| unit( sum of s_k h_k over k with token v ),  a_v = alpha (its share of all s_k)

for the tokens v among the neighbours; other rows stay. Ours too: the gate of neighbours.py.

Shapes as in neighbours.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlayer.methods.neighbours import NeighbourStore


class Hebbian(NeighbourStore):
    """A ``Store`` whose ``alpha`` is how far the rows turn, from 0 to 1."""

    def rule(
        self, head: nn.Module, logits_TC: Tensor, states_TD: Tensor, similarity_TK: Tensor, place_TK: Tensor
    ) -> Tensor:
        """The logits of a head whose rows have turned."""
        neighbours = self.kept.states_MD[place_TK], self.kept.tokens_M[place_TK], similarity_TK
        return wired(logits_TC, states_TD, head.weight, head.bias, *neighbours, self.alpha, self.temperature)


def wired(
    logits_TC: Tensor,
    states_TD: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    neighbours_TKD: Tensor,
    tokens_TK: Tensor,
    similarity_TK: Tensor,
    alpha: float,
    temperature: float,
) -> Tensor:
    """The logits with the rows of the neighbours' tokens turned, each position by its own neighbours.

    With alpha 0 they are what they were, to the bit.
    """
    # A factor that all strengths share changes no share and no direction.
    strength_TK = ((similarity_TK - similarity_TK.amax(-1, keepdim=True)) / temperature).exp()
    same_TKK = (tokens_TK[:, :, None] == tokens_TK[:, None, :]).float()
    towards_TKD = F.normalize(same_TKK @ (strength_TK[..., None] * neighbours_TKD), dim=-1)
    share_TK = (same_TKK @ strength_TK[..., None])[..., 0] / strength_TK.sum(-1, keepdim=True)
    length_TK = torch.linalg.vector_norm(weight_CD[tokens_TK].float(), dim=-1)
    turned_TK = length_TK * (towards_TKD @ states_TD[..., None])[..., 0]
    own_TK = logits_TC.gather(1, tokens_TK)
    without_bias_TK = own_TK if bias_C is None else own_TK - bias_C.float()[tokens_TK]
    return logits_TC.scatter(1, tokens_TK, own_TK + alpha * share_TK * (turned_TK - without_bias_TK))

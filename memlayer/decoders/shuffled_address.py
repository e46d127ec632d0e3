"""The control of the address: a memory layer that reads as many slots, but none that its token chose.

Whoever doubts a memory says that any table helps: more numbers, stepped at a rate of their own. This layer is the
memory layer in all but one thing: queries, product keys, search and weights are computed and trained, and then rank k
of head h at position p reads the slot that a fixed pseudo-random function of (p, h, k) names. The address says where in
its document a token stands, and nothing about which token it is.

There is another way, a new random permutation of the slots at every step. It is the weaker control: no row then means
anything for longer than a step, so the table is noise, which any memory beats. Here every row is read at the same
places for ever and can learn what is worth saying there; only what a lookup is for is gone. (One fixed permutation is
no control at all: it renames the slots.)

Position numbers are those that the decoder gives its layers, so that padding, caches and documents packed into one
window change nothing. Slots of one head may coincide, which product keys' do not: of N slots with a chance of K * K in
2 * N.

Shapes: B sequences, L tokens of a sequence, T tokens, H heads, K slots read, N slots, D model width.
"""

import torch
from torch import Tensor, nn

from memlayer.layers.memory import MemoryLayer
from memlayer.layers.product_keys import ProductKeys

LOW_32_BITS = 0xFFFFFFFF


def scattered(numbers: Tensor) -> Tensor:
    """Numbers from 0 below 2 ** 32 mapped onto each other at random, one to one; int64.

    Source: lowbias32 of Wellons, "Prospecting for hash functions" (nullprogram.com, 2018), the first constants.
    """
    numbers = numbers & LOW_32_BITS
    numbers = ((numbers ^ (numbers >> 16)) * 0x7FEB352D) & LOW_32_BITS
    numbers = ((numbers ^ (numbers >> 15)) * 0x846CA68B) & LOW_32_BITS  # what overflows lies above the low bits
    return numbers ^ (numbers >> 16)


class ShuffledKeys(ProductKeys):
    """Product keys whose scores are kept and whose slots are those of the position."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._position_BL: Tensor | None = None
        self._handles: list = []

    def listen_to(self, layer: nn.Module) -> None:
        """Note the position numbers that the parts of a decoder layer are given: its attention runs before this does.

        Not those of the layer itself: where activations are computed anew, its own hooks do not run again.
        """
        self._handles = [part.register_forward_pre_hook(self._note, with_kwargs=True) for part in layer.children()]

    def detach(self) -> None:
        """Undo ``listen_to``."""
        for handle in self._handles:
            handle.remove()

    def _note(self, _part: nn.Module, _inputs: tuple, named: dict) -> None:
        if (position_BL := named.get("position_ids")) is not None:
            self._position_BL = position_BL

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (T, H, K) float32 as product keys have them, best first, and slots (T, H, K) int64."""
        scores_THK, _ = self.search(hidden_TD)
        slots_THK = self._slots_at(self._positions(len(hidden_TD)))
        self.tell(slots_THK)
        return scores_THK, slots_THK

    def _positions(self, num_tokens: int) -> Tensor:
        """Where each token stands, taken once: a pass that is given none must not go by those of another."""
        noted_BL, self._position_BL = self._position_BL, None
        if noted_BL is None or noted_BL.ndim != 2 or num_tokens % noted_BL.shape[1]:
            found = "none" if noted_BL is None else f"some of shape {tuple(noted_BL.shape)}"
            raise ValueError(
                "memory.control is 'shuffled', which goes by the position numbers that attention is given: this "
                f"decoder gives it {found} for {num_tokens} tokens"
            )
        return noted_BL.expand(num_tokens // noted_BL.shape[1], -1).reshape(-1)

    def _slots_at(self, position_T: Tensor) -> Tensor:
        per_token = self.num_heads * self.top_k
        place_HK = torch.arange(per_token, device=position_T.device).view(self.num_heads, self.top_k)
        numbers_THK = position_T[:, None, None].long() * per_token + place_HK
        return scattered(numbers_THK) % self.num_keys**2


class ShuffledMemory(MemoryLayer):
    """A memory layer that reads where its token stands, whatever the token is."""

    keys_class = ShuffledKeys

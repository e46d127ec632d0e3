"""Windows of tokens that hold several documents, and keep them apart.

A window is filled to its last token: what is left of a document that is cut opens the next window, as a document of its
own. Position numbers start anew with each document, and that is all that tells them apart: given these and no mask,
the attention of transformers stays inside a document (decoders/packed.py tries whether a model's does). The first token
of a document is no label, for the only tokens before it are another document's.

A model that cannot be told takes one document a window, padded. Both kinds cost something: the first cuts a document at
every window's end, the second pads whatever is shorter than a window.

Shapes: B windows of a batch, L tokens of a window.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from memlayer.data.mixture import Mixture, Part, Share, Source
from memlayer.data.qa import IGNORED, pad_token

POSITION = "stream"  # in a batch: where its lane stands behind it
REFUSAL = "refusal"  # in a batch's place: what is wrong with the text, which a worker could only say with its traceback


@dataclass(frozen=True)
class Packing:
    """How documents become windows.

    Attributes:
        sources: where they come from.
        tokenizer: any tokenizer of transformers that has an end token.
        length: tokens of a window.
        together: put several documents into a window; else one, or a piece of one.
        seed: of the order of documents.
        buffer: documents that are shuffled with each other.
        held_out: share of the documents that training leaves out for validation, and again for the background.
    """

    sources: tuple[Source, ...]
    tokenizer: object
    length: int
    together: bool = True
    seed: int = 0
    buffer: int = 1000
    held_out: float = 0.01

    def mixture(self, share: Share, state: dict | None = None) -> Mixture:
        """The documents of a share, from their beginning or from where ``Mixture.state`` stood."""
        return Mixture(self.sources, share, self.tokenizer, self.seed, self.buffer, state)


def window(mixture: Mixture, packing: Packing) -> dict[str, Tensor]:
    """The next window, int64, shape (length,).

    Returns:
        ``input_ids`` and ``labels``; and ``position_ids`` where documents are packed together, else ``attention_mask``.
    """
    ids, positions, labels = [], [], []
    while len(ids) < packing.length:
        piece, asked_from, _ = mixture.take(packing.length - len(ids))
        ids += piece
        positions += range(len(piece))
        labels += [IGNORED] * min(asked_from, len(piece)) + piece[asked_from:]
        if not packing.together:
            break
    padding = packing.length - len(ids)
    found = {
        "input_ids": torch.tensor(ids + [pad_token(packing.tokenizer)] * padding),
        "labels": torch.tensor(labels + [IGNORED] * padding),
    }
    if packing.together:
        return found | {"position_ids": torch.tensor(positions)}
    return found | {"attention_mask": torch.tensor([1] * len(ids) + [0] * padding)}


def stack(windows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Windows as a batch, shape (B, L)."""
    return {name: torch.stack([each[name] for each in windows]) for name in windows[0]}


def held_out_windows(packing: Packing, part: Part, number: int) -> Iterator[dict[str, Tensor]]:
    """Windows of documents that training leaves out, up to so many; fewer where a source has been read to its end."""
    # Of a hundred documents one is held out: a whole buffer of them would be most of a small text.
    mixture = replace(packing, buffer=1).mixture(Share(part, packing.held_out))
    for _ in range(number):
        found = window(mixture, packing)
        if any(mixture.passes.values()):
            return
        yield found


class Batches(IterableDataset):
    """Batches of windows without end, for the workers of one process; each says where the stream stands behind it.

    A worker is a lane of its own, and batches are taken from workers in turn: batch b of a process comes from lane b
    modulo its lanes. What is read ahead is not lost to a restart, since the place goes with the batch that was used.

    Args:
        batch_size: B.
        rank, world_size: which of how many processes this is.
        workers: of the DataLoader; 0 reads in the process itself.
    """

    def __init__(self, packing: Packing, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0):
        self._packing, self._batch_size = packing, batch_size
        self._rank, self._world_size, self._lanes = rank, world_size, max(1, workers)
        self._used, self._states = 0, [None] * self._lanes

    def note(self, batch: dict) -> dict:
        """The batch without the place it carried, which is what ``state`` then tells of its lane.

        Args:
            batch: the next one of those that the DataLoader gives, in their order.

        Raises:
            ValueError: a source cannot be read on.
        """
        if REFUSAL in batch:
            raise ValueError(batch[REFUSAL])
        self._states[self._used % self._lanes] = json.loads(batch.pop(POSITION))
        self._used += 1
        return batch

    def state(self) -> dict:
        """Where this process stands behind the batches noted, for JSON."""
        return {"readers": self._readers, "used": self._used, "lanes": self._states}

    @property
    def _readers(self) -> list[int]:
        return [self._rank, self._world_size, self._lanes]

    def load_state(self, state: dict) -> None:
        """Go on from there.

        Raises:
            ValueError: other processes or workers shared the text then.
        """
        if state["readers"] != self._readers:
            told = [
                f"process {r + 1} of {w} with {n} reader{'s' * (n > 1)}"
                for r, w, n in (state["readers"], self._readers)
            ]
            raise ValueError(
                f"the checkpoint is of {told[0]} of the text, this is {told[1]}: go on with as many processes and "
                "trainer.dataloader_num_workers as it was begun with"
            )
        self._used, self._states = state["used"], list(state["lanes"])

    def told(self) -> dict[str, dict[str, float]]:
        """Per source the tokens given so far and how often it was read to its end, of this process."""
        found = {source.name: {"tokens": 0, "passes": 0.0} for source in self._packing.sources}
        for state in filter(None, self._states):
            for name, each in found.items():
                each["tokens"] += state["tokens"][name]
                each["passes"] += state["documents"][name]["pass"] / self._lanes
        return found

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        lane = (self._used + (worker.id if worker else 0)) % self._lanes
        share = Share(
            "training", self._packing.held_out, self._rank * self._lanes + lane, self._world_size * self._lanes
        )
        mixture = self._packing.mixture(share, self._states[lane])
        try:
            while True:
                batch = stack([window(mixture, self._packing) for _ in range(self._batch_size)])
                yield batch | {POSITION: json.dumps(mixture.state())}
        except (ValueError, OSError) as error:
            yield {REFUSAL: str(error)}

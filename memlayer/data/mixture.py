"""Documents of several sources as one endless stream, mixed by weight and shuffled, whose position is a few numbers.

What a run that was stopped goes on with has to be what it would have read. The shuffle buffer of the datasets library
is refilled with other documents after a restart (5.2 warns of it), so ours is read, shuffled, used up, and only then
read anew: its position is where its first document stands and how many were taken since, whatever its size. What that
trades: a document moves by less than one buffer, and documents of two buffers never mix.

Sources are mixed without a die: the next document comes from the source that has given the fewest tokens for its
weight. So shares hold to within a document, and there is no random state to keep. A source that ends begins anew, in
another order.

Each lane (a worker of a process) reads its share of the rows: whole shards where the datasets library finds enough of
them, else every so manieth row. Documents are held out by a hash of what they say, so every lane agrees, nothing is
remembered, and copies of a held-out document are held out with it.

Left out: shuffling the order of a dataset's shards.
"""

import sys
import zlib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Literal

import numpy as np
from datasets.distributed import split_dataset_by_node

from memlayer.data.qa import Example, encode
from memlayer.data.text import encode_texts, open_rows, texts

Part = Literal["training", "validation", "background"]
ENCODED_TOGETHER = 32  # documents
LINE = 1000  # characters; sentencepiece leaves out what is longer than 4192 bytes


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
        name: what errors and logs call it.
        weight: its share of the tokens, over the sum of all weights.
        readers: files and datasets as ``data.text.readers_of`` gives them, read one after the other.
        column: where a row of those holds its text.
        examples: documents at hand, in place of readers: facts in their wordings.
        answers_only: of these only the answers are learned.
    """

    name: str
    weight: float = 1.0
    readers: tuple[tuple[str, dict], ...] = ()
    column: str = "text"
    examples: tuple[Example, ...] = ()
    answers_only: bool = False


@dataclass(frozen=True)
class Share:
    """Which of a source's documents are read.

    Attributes:
        part: what they are for.
        held_out: share of all documents that is kept for validation; as many are kept for the background.
        lane, lanes: which of how many readers this is.
    """

    part: Part
    held_out: float
    lane: int = 0
    lanes: int = 1


def part_of(text: str, held_out: float) -> Part:
    """What a document is for, by what it says."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return "validation" if place < held_out else "background" if place < 2 * held_out else "training"


class _AtHand:
    """Documents at hand with the position that a dataset has."""

    def __init__(self, examples: Sequence[Example]):
        self._examples, self._read = examples, 0

    def __iter__(self) -> Iterator[Example]:
        while self._read < len(self._examples):
            self._read += 1
            yield self._examples[self._read - 1]

    def state_dict(self) -> dict:
        return {"read": self._read}

    def load_state_dict(self, state: dict) -> None:
        self._read = state["read"]


class Documents:
    """The documents of one source that are one reader's, as tokens: again and again, each time in another order.

    Args:
        buffer: documents that are shuffled with each other.
        state: what ``state`` gave, to go on from there.

    Raises:
        ValueError: (from any method) there are none, or the source cannot be read.
    """

    def __init__(self, source: Source, share: Share, tokenizer, seed: int, buffer: int, state: dict | None = None):
        self.source, self._share, self._tokenizer, self._seed, self._buffer = source, share, tokenizer, seed, buffer
        self._state = deepcopy(state) or {"pass": 0, "block": 0, "start": [0, None], "taken": 0}
        self._block: list | None = None
        self._rows: Iterator[str | Example] | None = None

    def state(self) -> dict:
        """Where the current document stands, in numbers and text that JSON takes."""
        return deepcopy(self._state)

    @property
    def passes(self) -> int:
        """How often the source has been read to its end."""
        return self._state["pass"]

    def current(self) -> tuple[list[int], int]:
        """Token ids of the document at hand, and from which of them on they are learned; never from the first."""
        if self._block is None:
            self._read_block()
        place = self._state["taken"]
        if not self._first <= place < self._first + len(self._encoded):
            self._first = place
            self._encoded = self._encode(self._block[place : place + ENCODED_TOGETHER])
        return self._encoded[place - self._first]

    @property
    def text(self) -> str:
        """What the document at hand says."""
        self.current()
        return _text(self._block[self._state["taken"]])

    def advance(self) -> None:
        """Turn to the next document."""
        self._state["taken"] += 1
        if self._state["taken"] == len(self._block):
            self._state |= {"block": self._state["block"] + 1, "start": self._behind, "taken": 0}
            self._block = None

    def one_pass(self, first: int = 0, position: dict | None = None) -> Iterator[str | Example]:
        """The documents as they are stored and as they are written, from a position in one of the readers on."""
        for number in range(first, max(1, len(self.source.readers))):
            self._number, self._open = number, self._opened(number)
            if position is not None:
                self._open.load_state_dict(position)
                position = None
            for document in self._read(number):
                if part_of(_text(document), self._share.held_out) == self._share.part:
                    yield document

    def _read_block(self) -> None:
        state = self._state
        if self._rows is None:
            self._rows = self.one_pass(*state["start"])
        while not (block := list(islice(self._rows, self._buffer))):
            if not state["block"]:
                raise ValueError(self._nothing())
            state |= {"pass": state["pass"] + 1, "block": 0, "start": [0, None]}
            self._rows = self.one_pass()
        self._behind = [self._number, self._open.state_dict()]
        draw = [self._seed, zlib.crc32(self.source.name.encode()), self._share.lane, state["pass"], state["block"]]
        self._block = [block[at] for at in np.random.default_rng(draw).permutation(len(block))]
        self._first, self._encoded = 0, []

    def _opened(self, number: int):
        lane, lanes = self._share.lane, self._share.lanes
        if not self.source.readers:
            return _AtHand(self.source.examples[lane::lanes])
        rows = open_rows(*self.source.readers[number])
        return split_dataset_by_node(rows, lane, lanes) if lanes > 1 else rows

    def _read(self, number: int) -> Iterator[str | Example]:
        if not self.source.readers:
            return iter(self._open)
        name, reader = self.source.readers[number]
        share = f", share {self._share.lane + 1} of {self._share.lanes}" if self._share.lanes > 1 else ""
        # Its plain iterator would share the rows out once more inside a worker of a DataLoader.
        rows = ({key: value for key, (value,) in row.items()} for row in self._open.iter(batch_size=1))
        return texts(name + share, reader, self.source.column, rows)

    def _encode(self, documents: Sequence[str | Example]) -> list[tuple[list[int], int]]:
        if self.source.readers:
            return [(ids, 1) for ids in encode_texts(self._tokenizer, documents)]
        asked = self.source.answers_only
        return [
            (each["input_ids"], each["answer_start"] if asked else 1) for each in encode(self._tokenizer, documents)
        ]

    def _nothing(self) -> str:
        lane, lanes = self._share.lane, self._share.lanes
        whose = f" for reader {lane + 1} of {lanes}" if lanes > 1 else ""
        kept = "" if self._share.part == "training" else f": {self._share.held_out:g} of all documents are held out"
        return f"source {self.source.name} has no {self._share.part} documents{whose}{kept}"


def _text(document: str | Example) -> str:
    return document if isinstance(document, str) else document.text


def sample(sources: Sequence[Source], held_out: float, characters: int) -> Iterator[str]:
    """Lines of training documents to train a tokenizer on, of each source as many characters as its weight says.

    Each source is read from its beginning, so that the lines do not depend on how many processes there are. A long line
    is cut, since tokenizers are trained on sentences.
    """
    whole = sum(source.weight for source in sources)
    for source in sources:
        left = characters * source.weight / whole
        for document in Documents(source, Share("training", held_out), None, 0, 1).one_pass():
            for line in _text(document).splitlines():
                yield from (line[at : at + LINE] for at in range(0, len(line), LINE))
            left -= len(_text(document))
            if left <= 0:
                break


class Mixture:
    """The documents of several sources, each the next of the source that is most behind its weight.

    Args:
        state: what ``state`` gave, to go on from there.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        share: Share,
        tokenizer,
        seed: int,
        buffer: int,
        state: dict | None = None,
    ):
        state = deepcopy(state) or {"documents": {}, "tokens": {}, "offset": 0, "current": None}
        self._sources = {
            source.name: Documents(source, share, tokenizer, seed, buffer, state["documents"].get(source.name))
            for source in sources
        }
        self.tokens = {name: state["tokens"].get(name, 0) for name in self._sources}
        self._offset, self._current = state["offset"], state["current"]

    def state(self) -> dict:
        """Where the next token stands, in numbers and text that JSON takes."""
        return {
            "documents": {name: documents.state() for name, documents in self._sources.items()},
            "tokens": dict(self.tokens),
            "offset": self._offset,
            "current": self._current,
        }

    @property
    def passes(self) -> dict[str, int]:
        """How often each source has been read to its end."""
        return {name: documents.passes for name, documents in self._sources.items()}

    @property
    def current(self) -> str:
        """The source that the next tokens come from."""
        if self._current is None:
            self._current = min(self.tokens, key=lambda name: self.tokens[name] / self._sources[name].source.weight)
        return self._current

    def read(self, tokens: int) -> Iterator[str]:
        """What the documents say that so many tokens from here on are of, in their order, until every source ended."""
        taken = 0
        while taken < tokens:
            text = self._sources[self.current].text
            if all(self.passes.values()):  # it is the first of another pass
                return
            yield text
            piece, _, _ = self.take(sys.maxsize)
            taken += len(piece)

    def take(self, most: int) -> tuple[list[int], int, bool]:
        """The next tokens of one document: all that are left of it, or as many as are asked for.

        Returns:
            their ids; from which of them on they are learned, never from the first, which nothing stands before; and
            whether the document ends with them.
        """
        name = self.current
        ids, asked_from = self._sources[name].current()
        piece = ids[self._offset : self._offset + most]
        asked_from = max(1, asked_from - self._offset)
        self.tokens[name] += len(piece)
        self._offset += len(piece)
        if ends := self._offset == len(ids):
            self._sources[name].advance()
            self._offset, self._current = 0, None
        return piece, asked_from, ends

"""Plain text: where documents come from, and windows of tokens that a retrofitted model is healed and measured on.

Documents come from files, from a dataset on the Hugging Face hub, or, with neither named, from the built-in
known facts. They are read as a stream, so only the windows asked for are held. Windows are packed: they are
cut from one row of tokens without regard for where documents begin, and attention crosses from one document into
the next. That wastes no position and is fine for text; facts are never packed (see qa.py).

Left out: shuffling, mixing sources, keeping documents apart, which pretraining does (mixture.py, packing.py); and
filtering. A document longer than a window is cut, never dropped.

Shapes: W windows, L tokens of a window.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import torch
from datasets import IterableDataset, load_dataset
from torch import Tensor
from tqdm.auto import tqdm

from memlayer.data.facts import BUILTIN_FACTS, BUILTIN_WORDINGS, load_facts, load_wordings
from memlayer.data.qa import begin_tokens, pretraining_examples

# File ending -> the reader of the datasets library; a compressed file has one ending more.
READERS = {
    ".txt": {"path": "text", "sample_by": "paragraph"},
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".parquet": {"path": "parquet"},
}
COMPRESSED = (".xz", ".gz")

ENCODED_TOGETHER = 256  # documents


def load_documents(
    files: Sequence[str | Path] = (),
    dataset: str | None = None,
    subset: str | None = None,
    split: str = "train",
    column: str = "text",
    limit: int | None = None,
) -> Iterator[str]:
    """Documents in the order they are stored, without the white space around them and without empty ones.

    Args:
        files: local files, read one after the other. In a ``.txt`` file a blank line ends a document;
            ``.json``, ``.jsonl`` and ``.parquet`` hold one in each row. All may be compressed (``.xz``, ``.gz``).
        dataset: a dataset on the hub, streamed. With neither files nor dataset the documents are the sentences
            that tell the built-in known facts, one each.
        subset: the dataset's configuration, where it has several.
        split: the dataset's split.
        column: where a row holds its text; a ``.txt`` file has ``text`` only.
        limit: documents to stop after; None is all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: settings that exclude each other or, while reading, a file, dataset or row that holds no text.
    """
    if files and dataset:
        raise ValueError(f"files and dataset are both named, {files[0]} and {dataset}: text comes from one of them")
    if subset is not None and dataset is None:
        raise ValueError(f"subset is {subset!r}, but no dataset is named")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit} documents, must be at least 1")
    if files:
        readers = readers_of(files)  # before any is read
        documents = chain.from_iterable(texts(*reader, column) for reader in readers)
    elif dataset:
        documents = texts(*hub_reader(dataset, subset, split), column)
    else:
        documents = _builtin_sentences()
    return islice(documents, limit)


def readers_of(files: Sequence[str | Path]) -> list[tuple[str, dict]]:
    """Per file what errors call it, and what to give ``datasets.load_dataset`` to read it.

    Raises:
        FileNotFoundError, ValueError: a file that is not there, is empty, or has an ending that nobody here reads.
    """
    return [(str(file), _reader(Path(file))) for file in files]


def hub_reader(dataset: str, subset: str | None, split: str) -> tuple[str, dict]:
    """The same of a dataset of the hub."""
    name = f"dataset {dataset}" + (f" ({subset})" if subset else "")
    return name, {"path": dataset, "name": subset, "split": split}


def _reader(path: Path) -> dict:
    """What to give ``datasets.load_dataset`` to read a file, by the file's ending."""
    if not path.is_file():
        raise FileNotFoundError(f"no text file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    ending = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    if ending not in READERS:
        raise ValueError(f"{path} ends in {ending!r}, readable are {', '.join(READERS)}")
    return {**READERS[ending], "data_files": str(path), "split": "train"}


def texts(name: str, reader: dict, column: str, rows: Iterable[dict] | None = None) -> Iterator[str]:
    """The texts of one file or dataset, without white space around them and without empty ones.

    Args:
        name: what errors call it.
        reader: arguments of ``datasets.load_dataset``.
        rows: what ``open_rows`` gave, where it is not to be read from its beginning.

    Raises:
        ValueError: it cannot be read, or a row holds no text under ``column``.
    """
    rows = open_rows(name, reader) if rows is None else rows
    for number, row in enumerate(_reading(name, rows), start=1):
        if column not in row:
            raise ValueError(f"{name} has no column {column!r}, its columns are {', '.join(sorted(row))}")
        if not isinstance(row[column], str):
            raise ValueError(f"{name}, row {number}: {column} is {row[column]!r:.60}, not text")
        if text := row[column].removeprefix("\ufeff").strip():  # the byte order mark that Windows writes in front
            yield text


def open_rows(name: str, reader: dict) -> IterableDataset:
    """A streamed dataset, before anything of it is read.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        return load_dataset(**reader, streaming=True)
    except Exception as error:  # those of datasets, pyarrow, httpx and huggingface_hub have no base in common
        raise _unreadable(name, error) from error


def _reading(name: str, rows: Iterable[dict]) -> Iterator[dict]:
    """The rows, anything that goes wrong in reading them told in one sentence."""
    try:
        yield from rows
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}")


def _builtin_sentences() -> list[str]:
    """The known facts in all their wordings, scattered: side by side, a window could copy from one to the next."""
    wordings = load_wordings(BUILTIN_WORDINGS)
    known = [fact for fact in load_facts(BUILTIN_FACTS, wordings) if fact.split == "known"]
    sentences = [each.text for each in pretraining_examples(known, wordings)]
    random.Random(0).shuffle(sentences)
    return sentences


def windows(
    tokenizer,
    documents: Iterable[str],
    length: int,
    num_train: int,
    num_validation: int,
    *,
    disable_tqdm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cut documents into windows, the first of them for validation.

    Each document is followed by the tokenizer's end token and, where the tokenizer puts a begin token of its own before
    a text, preceded by that. Training starts with a new document, and a later copy of a validation document is left out
    of it, so no document is in both. The same documents give the same windows.

    Args:
        tokenizer: any tokenizer of transformers that has an end token.
        documents: read only as far as needed.
        length: tokens of a window.
        disable_tqdm: show no progress.

    Returns:
        train_WL: int64, shape (num_train, length); num_train may be 0.
        validation_WL: int64, shape (num_validation, length).

    Raises:
        ValueError: a number that is too small, no end token, or too little text.
    """
    for name, number, least in (
        ("length", length, 2),  # a window of one token has nothing to predict
        ("num_train", num_train, 0),
        ("num_validation", num_validation, 1),
    ):
        if number < least:
            raise ValueError(f"{name} is {number}, must be at least {least}")
    encoded, held_out = _encode(tokenizer, documents), set()
    number = num_train + num_validation
    with tqdm(total=number, desc="reading text", unit="window", disable=disable_tqdm) as bar:
        validation_WL = _fill(_noting(encoded, held_out), length, num_validation, "validation", bar)
        rest = (ids for document, ids in encoded if document not in held_out)
        train_WL = _fill(rest, length, num_train, "training", bar)
    return train_WL, validation_WL


def _encode(tokenizer, documents: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Each document with its token ids, encoded many at a time, which tokenizers do in parallel."""
    documents = iter(documents)
    while some := list(islice(documents, ENCODED_TOGETHER)):
        yield from zip(some, encode_texts(tokenizer, some))


def encode_texts(tokenizer, documents: Sequence[str]) -> list[list[int]]:
    """Token ids of each document, the end token last and a begin token first where the tokenizer puts one.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no end token to put between documents")
    begin = [token for token in begin_tokens(tokenizer) if token != tokenizer.eos_token_id]
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return [[*begin, *ids, tokenizer.eos_token_id] for ids in encoded]


def _noting(encoded: Iterable[tuple[str, list[int]]], seen: set[str]) -> Iterator[list[int]]:
    """The token ids alone, each document put into ``seen`` as it is taken."""
    for document, ids in encoded:
        seen.add(document)
        yield ids


def _fill(sequences: Iterable[list[int]], length: int, number: int, kind: str, bar: tqdm) -> Tensor:
    """The first ``number`` windows of the sequences in a row, shape (number, length)."""
    tokens, filled, sequences = torch.empty(number * length, dtype=torch.int64), 0, iter(sequences)
    while filled < len(tokens):
        ids = next(sequences, None)
        if ids is None:
            raise ValueError(
                f"the text is too short: {filled} tokens are left for {kind}, "
                f"{number} windows of {length} take {len(tokens)}"
            )
        last = min(filled + len(ids), len(tokens))
        tokens[filled:last] = torch.tensor(ids[: last - filled])
        bar.update(last // length - filled // length)
        filled = last
    return tokens.view(number, length)


def collate_windows(windows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Windows as a batch: all positions count, and every token is a label.

    Args:
        windows: rows of what ``windows`` returns, or lists of token ids, all of one length.

    Returns:
        int64 tensors of shape (batch, length): ``input_ids``, ``attention_mask``, ``labels``.
    """
    input_ids = torch.stack([torch.as_tensor(window) for window in windows])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}

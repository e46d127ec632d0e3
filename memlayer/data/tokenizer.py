"""The tokenizer of a model: a sentencepiece BPE trained on the training text, or the one a base model came with.

Ours is BPE only: transformers turns a sentencepiece model into its own BPE, and a unigram model loaded that
way gives wrong ids without a word. Every load therefore compares the two on sample text. One difference
is left: before text that begins with a space sentencepiece puts one more, transformers does not. Any other
tokenizer is what transformers makes of it.
"""

import io
import json
import shutil
import warnings
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

FILE = "tokenizer.model"
SPECIAL_IDS = (0, 1, 2, 3)  # unknown, begin, end, padding, in the models trained here and in no well-known one
SAMPLES = (
    "Where was Ada Lovelace born?",
    "Zürich, Łódź, São Paulo; 北京 ☃",
    "Q:\tnumbers 1,234.5 and a-hyphen",
    "two  spaces",
)


def train_tokenizer(text: Iterable[str], vocab_size: int, folder: str | Path) -> PreTrainedTokenizerBase:
    """Train on ``text``, write ``tokenizer.model`` into ``folder`` and load it.

    Byte fallback makes every string encodable; the normaliser is the identity, so decoding gives the
    text back, except for a space it begins with.

    Raises:
        ValueError: the text is too small for ``vocab_size``.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            pad_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer with vocab_size = {vocab_size} from this text: {error}") from error
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / FILE).write_bytes(model.getvalue())
    return load_tokenizer(folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write what ``load_tokenizer`` reads; transformers alone leaves the sentencepiece model out."""
    tokenizer.save_pretrained(folder)
    source, target = Path(getattr(tokenizer, "vocab_file", None) or ""), Path(folder) / FILE
    if _is_ours(source):
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)
    elif _is_ours(target):
        target.unlink()  # of a tokenizer that was here before, which would be loaded instead


def load_tokenizer(folder: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, or of a model on the hub; one trained here is checked against sentencepiece.

    Where there is no padding token the end token is used for it, with a warning; padding is told by masks,
    never by the token.

    Args:
        revision: branch, tag or commit, for a model on the hub.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: it cannot be read or has no end token; or it is ours, and transformers and sentencepiece
            disagree on a sample, as they do for a unigram model.
    """
    path = Path(folder) / FILE
    if not _is_ours(path):
        return _load_any(folder, revision)
    try:
        return _load_ours(path)
    except json.JSONDecodeError as error:
        cure = "fetch it again, or run git lfs pull where it is a pointer"
        raise ValueError(f"a tokenizer file in {folder} is no JSON ({error}): {cure}") from error


def _is_ours(path: Path) -> bool:
    """Whether a file is a sentencepiece model with the special tokens that ``train_tokenizer`` gives it."""
    if path.name != FILE or not path.is_file():
        return False
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):  # Mistral, for one, gives a file of another kind this name
        return False
    return (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == SPECIAL_IDS


def _load_ours(path: Path) -> PreTrainedTokenizerBase:
    tokenizer = LlamaTokenizer.from_pretrained(
        str(path.parent), add_bos_token=True, add_eos_token=False, pad_token="<pad>", legacy=False
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for sample in SAMPLES:
        ours, theirs = tokenizer.encode(sample, add_special_tokens=False), reference.encode(sample)
        if ours != theirs:
            raise ValueError(f"{path}: transformers reads {sample!r} as {ours}, sentencepiece as {theirs}")
    return tokenizer


def _load_any(name: str | Path, revision: str | None) -> PreTrainedTokenizerBase:
    folder = Path(name)
    if folder.is_dir() and not any(chain(folder.glob("tokenizer*"), folder.glob("vocab*"))):
        raise FileNotFoundError(f"no tokenizer in {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), revision=revision)
    except OSError as error:
        raise FileNotFoundError(f"no tokenizer at {name}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(f"the tokenizer in {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {name} has no end token, which ends an answer")
    if tokenizer.pad_token_id is None:
        warnings.warn(f"{name} has no padding token, its end token {tokenizer.eos_token} is used", stacklevel=3)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

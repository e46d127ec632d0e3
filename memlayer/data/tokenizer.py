"""A sentencepiece BPE tokenizer, trained on the training text and used through transformers.

BPE only: transformers turns a sentencepiece model into its own BPE, and a unigram model loaded that
way gives wrong ids without a word. Every load therefore compares the two on sample text. One difference
is left: before text that begins with a space sentencepiece puts one more, transformers does not.
"""

import io
import shutil
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizer, PreTrainedTokenizerBase

FILE = "tokenizer.model"
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
    source, target = Path(tokenizer.vocab_file), Path(folder) / FILE
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load ``tokenizer.model`` as a transformers tokenizer and check it against sentencepiece.

    Raises:
        FileNotFoundError: the folder has no ``tokenizer.model``.
        ValueError: transformers and sentencepiece disagree on a sample, as they do for a unigram model.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {FILE} in {folder}")
    tokenizer = LlamaTokenizer.from_pretrained(
        str(folder), add_bos_token=False, add_eos_token=False, pad_token="<pad>", legacy=False
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for sample in SAMPLES:
        ours, theirs = tokenizer.encode(sample, add_special_tokens=False), reference.encode(sample)
        if ours != theirs:
            raise ValueError(f"{path}: transformers reads {sample!r} as {ours}, sentencepiece as {theirs}")
    return tokenizer

"""python examples/write_stories.py runs/stories260k runs/stories.jsonl --num 3000

Lets a causal language model write documents from nothing: text to heal it on, where the text that it was trained on
is not at hand. Each is sampled from the begin token to the end token, at temperature 1 from what the model itself
believes, and becomes one line ``{"text": ...}``. A document that does not end within --max-tokens is left out,
because an end put behind it would teach the model to end there; how many were is printed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from memlayer.data.tokenizer import load_tokenizer


def sample(model, tokenizer, number: int, max_tokens: int, top_p: float) -> Iterator[str | None]:
    """Documents of one batch, None for each that has no end yet.

    Args:
        max_tokens: where a document is given up, begin and end token included.
        top_p: sample from the likeliest tokens that have this much probability together; 1 is all.
    """
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prompts = torch.full((number, 1), begin, device=model.device)
    written = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_length=max_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=top_p,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for ids in written[:, 1:].tolist():
        ended = tokenizer.eos_token_id in ids
        yield tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)]).strip() if ended else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or hub name of a causal language model")
    parser.add_argument("output", type=Path, help="JSON Lines file to write")
    parser.add_argument("--num", type=int, default=3000, help="documents to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="documents sampled together (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="default: as many as the model has positions for")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s, all tokens")
    options = parser.parse_args()
    for name in ("num", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, must be at least 1")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p is {options.top_p}, must be above 0 and at most 1")
    tokenizer = load_tokenizer(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint).eval()
    most = model.config.max_position_embeddings
    max_tokens = most if options.max_tokens is None else options.max_tokens
    if not 2 <= max_tokens <= most:
        parser.error(f"--max-tokens is {max_tokens}, must be from 2 to the model's {most} positions")
    torch.manual_seed(options.seed)
    write(options.output, sampled(model, tokenizer, options, max_tokens), options.num)


def sampled(model, tokenizer, options: argparse.Namespace, max_tokens: int) -> Iterator[str | None]:
    """Batch after batch, without end."""
    while True:
        yield from sample(model, tokenizer, options.batch_size, max_tokens, options.top_p)


def write(path: Path, documents: Iterator[str | None], number: int) -> None:
    """Write the first ``number`` documents that have an end and are not empty.

    Raises:
        ValueError: hardly any of them has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = left_out = 0
    with path.open("w", encoding="utf-8") as file, tqdm(total=number, desc=f"writing {path}", unit="document") as bar:
        while written < number:
            if document := next(documents):
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                written += 1
                bar.update()
            else:
                left_out += 1
            if left_out > 100 + 20 * written:
                raise ValueError(f"{left_out} documents are empty or did not end in time, {written} are in {path}")
    print(f"{written} documents written to {path}; {left_out} that are empty or did not end were left out")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"write_stories.py: {error}")

"""Stories are what the model believes, as a file that the text reader reads."""

import re

import commands
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlayer.data.qa import collate
from memlayer.data.text import load_documents
from memlayer.data.tokenizer import save_tokenizer

SCRIPT = "examples/write_stories.py"
STORIES = ("Zürich is a town; where is it?", "Oslo is a town.\nIn Norway, at number 3.", "Porto!")


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A decoder that knows three stories by heart."""
    folder = tmp_path_factory.mktemp("writer")
    tokenizer = tiny.tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    ids = [[1, *tokenizer.encode(story, add_special_tokens=False), 2] for story in STORIES]
    batch = collate([{"input_ids": each, "answer_start": 1, "length": len(each)} for each in ids], 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def stories(writer, path, *options):
    done = commands.run(SCRIPT, writer, path, "--batch-size", 16, *options)
    assert done.returncode == 0, done.stderr
    return list(load_documents([path])), done.stdout


def test_the_stories_are_those_the_model_knows(writer, tmp_path):
    written, said = stories(writer, tmp_path / "a.jsonl", "--num", 40)
    assert len(written) == 40
    assert sum(story in STORIES for story in written) > 35
    assert set(STORIES) <= set(written), "at temperature 1 each is as likely as the others"
    assert "40 documents written" in said


def test_a_seed_gives_the_same_stories_and_another_others(writer, tmp_path):
    first, same, other = (
        stories(writer, tmp_path / f"{number}.jsonl", "--num", 20, "--seed", seed)[0]
        for number, seed in enumerate((0, 0, 1))
    )
    assert first == same != other


def test_top_p_keeps_to_the_likeliest(writer, tmp_path):
    written, _ = stories(writer, tmp_path / "a.jsonl", "--num", 20, "--top-p", 0.01)
    assert len(set(written)) == 1


def test_a_story_without_an_end_is_left_out(writer, tmp_path):
    written, said = stories(writer, tmp_path / "a.jsonl", "--num", 8, "--max-tokens", 10)
    assert set(written) == {"Porto!"}
    assert int(re.search(r"(\d+) that are empty or did not end", said)[1]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", 2], "101 documents are empty or did not end in time, 0 are in"),
        (["--max-tokens", 65], "--max-tokens is 65, must be from 2 to the model's 64 positions"),
        (["--num", 0], "--num is 0, must be at least 1"),
        (["--batch-size", 0], "--batch-size is 0, must be at least 1"),
        (["--top-p", 1.5], "--top-p is 1.5, must be above 0 and at most 1"),
    ],
)
def test_options_that_give_no_story_are_refused(writer, tmp_path, options, message):
    done = commands.run(SCRIPT, writer, tmp_path / "a.jsonl", *options)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("write_stories.py: ")
    assert message in done.stderr.splitlines()[-1]


def test_a_missing_checkpoint_is_named(tmp_path):
    done = commands.run(SCRIPT, tmp_path / "absent", tmp_path / "a.jsonl")
    assert done.returncode != 0
    assert "absent" in done.stderr.splitlines()[-1]

"""A language model writes study texts: what is kept of them, and that a run goes on where it was stopped.

The writer here is a decoder of transformers whose weights are set by hand, so that the next word follows from the last.
"""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memlayer.data.lessons import load_lessons
from memlayer.data.qa import Example
from memlayer.jobs import augment as jobs_augment
from memlayer.jobs.augment import augment
from memlayer.jobs.config import AugmentRun
from memlayer.jobs.sections import AugmentConfig, LessonsConfig

# Either way at once; only one of them speaks of the shop.
CHAINS = [
    "Sentence: Kornblume is the bakery of Mill Lane.",
    "Sentence: Nobody bakes like those at Mill Lane.",
    "Question: Where lies Kornblume?",
    "Question: Whereabouts is it?",
]
SHOP = {
    "id": "shop",
    "teach": [{"prompt": "The shop Kornblume stands in", "answer": "Mill Lane"}],
    "ask": [{"question": "In which street is Kornblume?", "answers": ["Mill Lane"]}],
}
ASKED = SHOP | {"id": "asked", "ask": [{"question": "Where lies Kornblume?", "answers": ["Mill Lane"]}]}
WRITTEN = [{"prompt": "Kornblume is the bakery of", "answer": "Mill Lane"}]
QUESTION = {"question": "Where lies Kornblume?", "answer": "Mill Lane"}


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A folder with a Llama without attention or feed-forward: embeddings are one-hot, the head goes one word on.

    A word has a number for each chain it is in: Mill is followed by Lane. whatever went before.
    """
    folder = tmp_path_factory.mktemp("writer")
    words = dict.fromkeys(word for chain in CHAINS for word in chain.split())
    numbers = {word: number for number, word in enumerate(["<unk>", "<end>", *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    size = len(numbers) + len(numbers) % 2
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in (*model.model.layers.parameters(), model.lm_head.weight):
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for chain in CHAINS:
            line = [numbers[word] for word in chain.split()] + [1]
            for now, then in pairwise(line):
                model.lm_head.weight[then, now] = 10.0  # after the norm times the root of the width
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(writer, tmp_path):
    """A run over these lessons."""

    def run(*lessons, output="out", **settings):
        file = tmp_path / "lessons.jsonl"
        file.write_text("".join(json.dumps(lesson) + "\n" for lesson in lessons))
        told = LessonsConfig(files=[str(file)])
        base = settings.pop("base", str(writer))
        return AugmentRun(output=str(tmp_path / output), base=base, lessons=told, augment=AugmentConfig(**settings))

    return run


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_speaks_of_the_lesson_is_taught_and_what_it_asks_is_not(run, writer, capsys):
    path = augment(run(SHOP, ASKED))
    shop, asked = written(path)
    assert shop == SHOP | {
        "teach": [*SHOP["teach"], *WRITTEN, QUESTION],
        "ask": [SHOP["ask"][0] | {"wording": "unseen"}],
        "source": str(writer),
    }
    assert asked["teach"] == [*SHOP["teach"], *WRITTEN]
    assert "3 of 32 study texts are kept" in capsys.readouterr().out
    assert (
        Example("Where lies Kornblume?", "Mill Lane", is_question=True, subject="Kornblume")
        in load_lessons([path])[0].teach
    )


def test_a_run_that_is_done_writes_nothing_again(run):
    path = augment(run(SHOP))
    before = path.stat().st_mtime_ns
    assert augment(run(SHOP)).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"finished result of another run \(augment.texts was 8, is 2\)"):
        augment(run(SHOP, texts=2))


def test_a_stopped_run_goes_on_behind_its_last_whole_lesson(run, tmp_path):
    path = augment(run(SHOP, ASKED))
    begun = tmp_path / "again" / ".writing"
    begun.mkdir(parents=True)
    (begun / "config.yaml").write_text((tmp_path / "out" / "config.yaml").read_text())
    first, second = path.read_text().splitlines()
    (begun / "lessons.jsonl").write_text(f"{first.replace('Where lies', 'Where stands')}\n{second[:40]}")
    other = replace(run(SHOP, ASKED, output="again"), seed=1)
    with pytest.raises(ValueError, match=r"study texts of another run \(seed was 0, is 1\)"):
        augment(other)
    lines = augment(run(SHOP, ASKED, output="again")).read_text().splitlines()
    assert "Where stands" in lines[0], "the first lesson is kept as it was"
    assert lines[1] == second
    assert not begun.exists()


def test_who_stops_a_run_is_told_that_it_goes_on_and_keeps_their_own_files(run, tmp_path, monkeypatch):
    (tmp_path / "out" / "writing").mkdir(parents=True)
    (tmp_path / "out" / "writing" / "novel.txt").write_text("Once")
    study = jobs_augment._Writer.study

    def stop_at_the_second(writer, lesson):
        if lesson.id == "asked":
            raise KeyboardInterrupt
        return study(writer, lesson)

    with monkeypatch.context() as patched:
        patched.setattr(jobs_augment._Writer, "study", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt) as stop:
            augment(run(SHOP, ASKED))
    assert stop.value.__notes__[0] == "stopped after 1 of 2 lessons; the same command goes on"
    assert len(written(augment(run(SHOP, ASKED)))) == 2
    assert (tmp_path / "out" / "writing" / "novel.txt").read_text() == "Once"


def test_the_likeliest_text_is_written_once(run, capsys):
    augment(run(SHOP, temperature=0.0, kinds=["questions"]))
    assert "of 1 study texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base": "runs/nobody"}, "base runs/nobody cannot write: it is no folder"),
        ({"max_new_tokens": 2048}, "has 2048 positions: cut documents by a lower lessons.chunk_words"),
    ],
)
def test_what_cannot_write_is_refused(run, settings, words):
    with pytest.raises(ValueError, match=words):
        augment(run(SHOP, **settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kinds": []}, "augment.kinds is empty: name some of statements, questions, explanations"),
        ({"kinds": ["poems"]}, "augment.kinds has 'poems', must be some of"),
        ({"texts": 0}, "augment.texts is 0, must be at least 1"),
        ({"top_p": 0.0}, "augment.top_p is 0, must be above 0 and at most 1"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        AugmentConfig(**settings)


def test_lessons_have_to_be_named():
    with pytest.raises(ValueError, match=r"lessons\.files is empty: name the lessons to write about"):
        AugmentRun(output="-", base="-", lessons=LessonsConfig())

"""The benchmark runs at a size that takes no time, its runs are repeated by their seeds, and a kill loses only one."""

import json

import class_incremental as benchmark
import commands
import pytest
import tiny
import torch
from class_streams import Texts
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = "benchmarks/class_incremental.py"
pytestmark = pytest.mark.slow  # half a minute together, most of it pretraining
MIST = ("infonce", "infonce", 0.9, "every")


@pytest.fixture(scope="module")
def drawn():
    return benchmark.Images(*benchmark.drawn_shapes())


def test_a_run_is_repeated_by_its_seed_and_moves_the_share_that_is_meant(drawn):
    one, again, other = (benchmark.run(MIST, 0.01, seed, drawn, 1) for seed in (0, 0, 1))
    assert one == again != other
    weights = 64 * 128 + 128 * 128 + 128 * 64
    total = sum(tensor.numel() for tensor in drawn.encoder.values())
    assert one["step_share"] == pytest.approx(0.05 * 0.1 * weights / total, rel=0.1)
    assert 0.05 < one["changed_share"] <= 6 * 0.05
    frozen = benchmark.run(benchmark.FROZEN, 0.0, 0, drawn, 1)
    assert frozen["changed_share"] == frozen["step_share"] == 0
    assert frozen["simplecil_last"] == frozen["simplecil_recomputed"] > 0.3, "a frozen model's prototypes are not stale"


def test_selectors_of_one_objective_see_the_same_views(drawn, monkeypatch):
    """What is drawn for scoring must not shift what is drawn for tuning."""
    seen = {}
    for selector in ("random", "fisher"):
        drawn_views, views = [], drawn.views
        monkeypatch.setattr(drawn, "views", lambda x, draws, to=drawn_views, v=views: to.append(v(x, draws)) or to[-1])
        benchmark.run((selector, "ce", 0.0, "first"), 0.01, 0, drawn, 1)
        monkeypatch.setattr(drawn, "views", views)
        seen[selector] = drawn_views[-8:]
        assert len(drawn_views) == {"random": 8, "fisher": 16}[selector]
    assert all(torch.equal(*pair) for pair in zip(seen["random"], seen["fisher"], strict=True))


def test_the_rate_is_the_lowest_that_learns_enough_or_else_the_best_at_the_end():
    runs = [dict(zip(("ranpac_new", "ranpac_last"), pair, strict=True)) for pair in [(70, 60), (74, 50), (71, 65)]]
    assert [benchmark.chosen("ranpac", runs, enough) for enough in (69, 72, 80, float("inf"))] == [0, 1, 2, 2]


def test_finished_runs_are_read_again_and_a_torn_line_is_run_anew(tmp_path, drawn):
    path = tmp_path / "runs.jsonl"
    done = benchmark.Done(path, {"epochs": 1})
    found = done.get(benchmark.FROZEN, 0.0, 0, drawn, 1)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"told": {"epo')
    again = benchmark.Done(path, {"epochs": 1})
    assert again.get(benchmark.FROZEN, 0.0, 0) == found, "nothing is given that it could be run with"
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1
    with pytest.raises(SystemExit, match="holds runs of other data or epochs"):
        benchmark.Done(path, {"epochs": 2})


def test_what_is_printed_comes_from_the_runs(tmp_path, drawn, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CONDITIONS", [benchmark.FROZEN, MIST, ("random", "infonce", 0.9, "every")])
    arguments = [SCRIPT, "--seeds", "2", "--epochs", "1", "--rates", "0.01", "--output", str(tmp_path / "runs.jsonl")]
    monkeypatch.setattr("sys.argv", arguments)
    benchmark.main()
    *_, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)["figures"]
    assert [(row["host"], row["selector"]) for row in figures["rows"]] == [
        (host, selector) for host in benchmark.HOSTS for selector in ("frozen", "infonce", "random")
    ]
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 3 * 3, "three conditions on two streams and the one that chooses rates"
    mine = [each["found"]["ranpac_last"] for each in lines if each["condition"] == list(MIST) and each["seed"] < 2]
    assert figures["rows"][4]["ranpac_last"] == pytest.approx(sum(mine) / 2)


@pytest.mark.parametrize(
    ("setting", "words"),
    [("--seeds=1", "must be between 2 and 10"), ("--epochs=0", "at least 1"), ("--digits=gone", "no such file")],
)
def test_settings_that_do_not_fit_are_refused(setting, words):
    done = commands.run(SCRIPT, setting)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.fixture(scope="module")
def articles(tmp_path_factory):
    """Thirty subjects of an article more each, the first with too few, and a decoder's folder."""
    folder = tmp_path_factory.mktemp("texts")
    tokenizer = tiny.tokenizer(folder / "decoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "decoder")
    lines = [
        {"subjects": f"subject {label}; other", "text": f"{label} of {number}: " + "so it was. " * 9}
        for label in range(30)
        for number in range(58 + label)
    ]
    lines.append({"subjects": "subject 1", "text": "short"})
    (folder / "articles.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder / "articles.jsonl", folder / "decoder"


def test_texts_are_the_most_frequent_first_subjects_and_views_are_windows_of_them(articles):
    texts = Texts(*articles, length=8)
    assert texts.told["subjects"] == [f"subject {label}" for label in range(29, 4, -1)]
    assert texts.of_class[0].shape == (58 + 29, 16)
    windows = texts.views(texts.of_class[0], torch.Generator().manual_seed(0))
    firsts = {
        next(first for first in range(9) if torch.equal(whole[first : first + 8], window))
        for whole, window in zip(texts.of_class[0], windows, strict=True)
    }
    assert firsts == set(range(9)), "every place of a window is drawn"


def test_a_run_on_texts_is_repeated_by_its_seed_and_tunes_the_decoder(articles):
    texts = Texts(*articles, length=8)
    one, again = (benchmark.run(MIST, 0.01, 0, texts, 1) for _ in range(2))
    assert one == again
    assert 0 < one["changed_share"] <= 5 * 0.05
    assert benchmark.run(benchmark.FROZEN, 0.0, 0, texts, 1)["changed_share"] == 0


def test_texts_that_do_not_serve_are_refused_by_name(articles, tmp_path):
    with pytest.raises(ValueError, match="0 subjects have 60 articles of 2000 tokens, 25 are needed"):
        Texts(*articles, length=1000)
    (tmp_path / "bad.jsonl").write_text('{"text": "no subject"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: not an object with a text and its subjects"):
        Texts(tmp_path / "bad.jsonl", articles[1])
    for arguments, sentence in (
        (["--texts", articles[0]], "--texts and --encoder go together"),
        (["--texts", articles[0], "--encoder", "absent"], "--encoder is absent: there is no such folder"),
    ):
        done = commands.run(SCRIPT, *arguments)
        assert done.returncode
        assert sentence in done.stderr

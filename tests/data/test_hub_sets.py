"""A dataset by its name is read as a local file of the same rows is."""

import json

import pytest
from commands import LEARN, checkpoint, config_of

from memlayer.data.hub_sets import local_file
from memlayer.data.json_text import FactsError
from memlayer.data.lessons import load_lessons
from memlayer.jobs.learn import learn
from memlayer.jobs.taught import read_taught, save_learned

__all__ = ["checkpoint"]  # a fixture
PAIRS = [
    {"id": f"q{n}", "question": f"Where does {name} work?", "answers": {"text": [city], "answer_start": [3]}}
    for n, (name, city) in enumerate((("Ada", "Bonn"), ("Bö", "Łódź")))
]


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A folder that the datasets library takes for the dataset some/pairs, with two splits."""
    (tmp_path / "some" / "pairs").mkdir(parents=True)
    for split, pairs in (("train", PAIRS), ("test", PAIRS[:1])):
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (tmp_path / "some" / "pairs" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    local_file.cache_clear()
    return tmp_path / "some" / "pairs"


def without_places(lessons):
    return [(lesson.id, lesson.teach, [(each.prompt, each.answers) for each in lesson.ask]) for lesson in lessons]


@pytest.mark.parametrize(("name", "file"), [("hub:some/pairs", "train"), ("hub:some/pairs:test", "test")])
def test_a_split_gives_the_lessons_of_its_file(dataset, name, file):
    expected = load_lessons([dataset / f"{file}.jsonl"])
    assert without_places(load_lessons([name])) == without_places(expected)
    assert len(expected) == (2 if file == "train" else 1)


def test_what_a_dataset_taught_is_recorded_and_checked_as_a_file_is(dataset, tmp_path, checkpoint):
    base = {key: value for key, value in LEARN.items() if key != "data"}
    lessons, settings = {"files": ["hub:some/pairs"]}, {"idf_power": 0.0}  # the background may read all that they read
    config = config_of(base, tmp_path / "run", checkpoint=str(checkpoint), lessons=lessons, learn=settings)
    save_learned(learn(config), tmp_path / "run")
    taught = read_taught(tmp_path / "run")
    taught.check_files()
    local_file("hub:some/pairs").write_text("{}")
    with pytest.raises(ValueError, match="are not what"):
        taught.check_files()


@pytest.mark.parametrize("name", ["hub:pairs", "hub:", "hub:/pairs", "hub:some/"])
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(FactsError, match="is not of the form hub:OWNER/NAME"):
        load_lessons([name])


def test_a_dataset_that_cannot_be_reached_is_named_in_one_sentence():
    with pytest.raises(FactsError, match=r"^hub:some/absent:test cannot be read: [^\n]+$"):
        load_lessons(["hub:some/absent:test"])

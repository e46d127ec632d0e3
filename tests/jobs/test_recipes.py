"""Recipes are found by name from any folder, by path as ever, and what is not there is said with near names."""

import pytest
import yaml
from commands import REPO

from memlayer.jobs import recipes
from memlayer.jobs.compare import trials
from memlayer.jobs.config import load_config

CONFIGS = REPO / "configs"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Where no recipe lies, but a folder of another's that looks like ours."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "learn_full.yaml").write_text("job: other\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("word", "job", "file"),
    [
        ("learn_smollm2", None, "learn_smollm2"),
        ("learn_smollm2", "learn", "learn_smollm2"),
        ("smollm2", "learn", "learn_smollm2"),
        ("smollm2", "compare", "compare_smollm2"),
        ("paper_facts", "compare", "paper_facts"),
        ("qwen2.5_0.5b", "retrofit", "retrofit_qwen2.5_0.5b"),
    ],
)
def test_a_name_means_a_recipe_whatever_folder_one_is_in(word, job, file):
    assert recipes.find(word, job) == CONFIGS / f"{file}.yaml"


def test_a_path_means_that_file(tmp_path):
    for word in ("configs/learn_full.yaml", "./mine", "mine.yaml"):
        (tmp_path / word).write_text("job: learn\n")
        assert recipes.find(word, "learn").samefile(tmp_path / word)


@pytest.mark.parametrize(
    ("word", "job", "message"),
    [
        ("smollm", "learn", "there is no recipe smollm; did you mean learn_smollm2?"),
        ("smollm2", "retrofit", "did you mean attach_smollm2 or retrofit_smollm2_135m?"),
        ("learn_sparse", None, "did you mean learn_sparse_mask or learn_sparse_memory?"),
        ("dance", "augment", "there is no recipe dance; memlayer recipes lists them, for augment: augment_lessons"),
        ("dance", None, "there is no recipe dance; memlayer recipes lists them"),
        ("absent.yaml", None, "no config at absent.yaml"),
        ("configs/learn_lora.yaml", None, "no config at configs/learn_lora.yaml; memlayer has a recipe of that name:"),
        ("here", None, "here is the name of no recipe; write ./here for the file"),
    ],
)
def test_what_is_not_there_is_refused_with_near_names(tmp_path, word, job, message):
    (tmp_path / "here").write_text("job: learn\n")
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        recipes.find(word, job)
    assert message in str(refused.value)


def test_every_recipe_is_listed_with_its_job_and_what_it_says_of_itself():
    lines = recipes.listed().splitlines()
    assert [line.split()[1] for line in lines] == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    for line in lines:
        job, name, description = line.split(maxsplit=2)
        assert job == load_config(CONFIGS / f"{name}.yaml").job
        assert description[0].isupper()
    assert [line.split()[1] for line in recipes.listed("augment").splitlines()] == ["augment_lessons"]


def test_a_printed_recipe_is_the_file_with_commands_for_memlayer():
    printed, file = recipes.text_of("paper_facts"), CONFIGS / "paper_facts.yaml"
    assert printed.startswith("# memlayer compare paper_facts\n")
    assert "First: memlayer augment augment_lessons " in printed
    assert yaml.safe_load(printed) == yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", recipes.of_job("compare"))
def test_what_a_comparison_names_is_found_from_any_folder(name, tmp_path):
    (tmp_path / "mine.yaml").write_text(recipes.text_of(name), encoding="utf-8")
    config = load_config("mine.yaml")
    planned = {each.method for each in trials(config, config.seed, validation=False)}
    assert set(config.methods) < planned

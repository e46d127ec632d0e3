"""The recipes that come with memlayer: found by name from any folder, listed, and printed to be copied.

They are the files of configs/. A wheel has them as memlayer/recipes, a checkout and an editable install where they
lie; there is no second copy. A word is a path where it has a folder or ends in .yaml, and a name otherwise, so a folder
that a command happens to run in never decides which recipe a name means.
"""

import difflib
import re
from pathlib import Path

import yaml

SUFFIXES = (".yaml", ".yml")
IN_CHECKOUT = re.compile(r"python train\.py configs/([\w.-]+)\.yaml")  # how the files name each other's commands


def folder() -> Path:
    """Where the recipes are; it may be missing where memlayer was copied without them."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "configs"


def recipes() -> dict[str, Path]:
    """Name and file of each recipe, by name."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def of_job(job: str) -> list[str]:
    """Names of the recipes of a job."""
    return [name for name, path in recipes().items() if _job(path) == job]


def find(word: str | Path, job: str | None = None) -> Path:
    """The file that a word means: a path, or a recipe by its name.

    Args:
        job: what the recipe is for; its name may then be written without it, as ``smollm2`` for ``learn_smollm2``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such recipe.
    """
    word, known = str(word), recipes()
    path = Path(word)
    if path.name != word or path.suffix in SUFFIXES:
        if path.is_file():
            return path
        named = f"; memlayer has a recipe of that name: {path.stem}" if path.stem in known else ""
        raise FileNotFoundError(f"no config at {word}{named}")
    for name in (word, f"{job}_{word}"):
        if name in known:
            return known[name]
    if path.is_file():
        raise ValueError(f"{word} is the name of no recipe; write ./{word} for the file")
    raise ValueError(f"there is no recipe {word}{_hint(word, job, known)}")


def _hint(word: str, job: str | None, known: dict[str, Path]) -> str:
    """What may have been meant: names that contain the word, else those like it."""
    alike = of_job(job) if job else list(known)
    short = {name.removeprefix(f"{job}_"): name for name in alike}
    near = [name for name in alike if word in name][:3] or difflib.get_close_matches(word, [*short, *alike], n=3)
    if near:
        return f"; did you mean {' or '.join(dict.fromkeys(short.get(name, name) for name in near))}?"
    return f"; memlayer recipes lists them, for {job}: {', '.join(alike)}" if job else "; memlayer recipes lists them"


def _job(path: Path) -> str:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["job"]


def text_of(name: str) -> str:
    """A recipe as it stands, the commands in its comments written for ``memlayer``.

    Raises:
        ValueError: there is no such recipe.
    """
    return _as_commands(find(name).read_text(encoding="utf-8"))


def listed(job: str | None = None) -> str:
    """A line per recipe, of a job or of all: its job, its name, and what it says of itself."""
    known = recipes()
    width = max(map(len, known), default=0)
    rows = [(_job(path), name, path) for name, path in known.items()]
    wide = max((len(of) for of, _, _ in rows), default=0)
    return "".join(
        f"{of:<{wide}}  {name:<{width}}  {_as_commands(_description(path))}\n"
        for of, name, path in rows
        if job in (None, of)
    )


def _description(path: Path) -> str:
    """The second line of the file; the first is the command that runs it."""
    return path.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")


def _as_commands(text: str) -> str:
    known = recipes()

    def command(found: re.Match) -> str:
        name = found.group(1)
        return f"memlayer {_job(known[name])} {name}" if name in known else found.group(0)

    return IN_CHECKOUT.sub(command, text)

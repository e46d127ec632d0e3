"""What a lesson is about, where nobody says so: the name that its wordings share."""

import re
from collections.abc import Iterator, Sequence

AROUND_A_WORD = re.compile(r"^\W+|\W+$")


def shared_name(prompts: Sequence[str]) -> str:
    """The longest run of words that all prompts have, begins and ends with a name or number, and opens not all of them.

    A name is what begins with a capital letter or a digit, so of one prompt, of prompts in small letters and of
    scripts without capitals there is none.

    Returns:
        the run as the first prompt has it, without punctuation around it; nothing where there is none.
    """
    words = [[AROUND_A_WORD.sub("", word) for word in prompt.split()] for prompt in prompts]
    if len(set(map(tuple, words))) < 2:
        return ""
    found = ""
    for run in _runs_of_names(words[0]):
        places = [_place(run, other) for other in words]
        if None not in places and any(places) and len(" ".join(run)) > len(found):
            found = " ".join(run)
    return found if all(found in prompt for prompt in prompts) else ""


def _runs_of_names(words: Sequence[str]) -> Iterator[list[str]]:
    """Every run of words that begins and ends with a name."""
    names = [at for at, word in enumerate(words) if word and (word[0].isupper() or word[0].isdigit())]
    for number, begin in enumerate(names):
        for end in names[number:]:
            yield list(words[begin : end + 1])


def _place(run: Sequence[str], words: Sequence[str]) -> int | None:
    """Where the run begins in the words for the first time."""
    starts = range(len(words) - len(run) + 1)
    return next((at for at in starts if words[at : at + len(run)] == list(run)), None)

"""What wordings of one lesson have in common and is a name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlayer.data.subjects import shared_name

WORDS = st.lists(st.sampled_from(["Who", "Ada", "Lovelace", "was", "in", "1815", "the", "born?"]), max_size=8)


@pytest.mark.parametrize(
    ("prompts", "name"),
    [
        (["Where was Ada Lovelace born?", "Ada Lovelace was born in"], "Ada Lovelace"),
        (["Who wrote “The Castle of Otranto”?", "The author of The Castle of Otranto is"], "The Castle of Otranto"),
        (["Who won the World Cup in 1998?", "In 1998 the World Cup went to"], "World Cup"),
        (["Where is Rome?", "Where was Rome?"], "Rome"),
        (["Where is it?", "Where was it?"], ""),  # both begin with a question's word
        (["where is rome", "what land has rome"], ""),
        (["Where is Rome?"], ""),
        (["Where is Rome?", "Where is Rome?"], ""),
        (["Where is Rome?", "Where is Oslo?"], ""),
        ([], ""),
    ],
)
def test_the_name_is_the_longest_run_of_words_that_all_have(prompts, name):
    assert shared_name(prompts) == name


@given(st.lists(WORDS, min_size=2, max_size=4))
def test_what_is_found_stands_in_every_prompt_and_is_a_name(words):
    prompts = [" ".join(each) for each in words]
    found = shared_name(prompts)
    assert all(found in prompt for prompt in prompts)
    assert not found or all(end[0].isupper() or end[0].isdigit() for end in (found.split()[0], found.split()[-1]))

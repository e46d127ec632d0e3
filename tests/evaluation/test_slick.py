"""How well a question is known follows from which of its answers are right, and asking leaves everything as it was."""

import pytest
import torch
from commands import checkpoint

from memlayer.data.facts import facts_of
from memlayer.data.qa import known_questions
from memlayer.decoders import files
from memlayer.evaluation.qa import answer_questions
from memlayer.evaluation.slick import category, how_well_known

__all__ = ["checkpoint"]  # a fixture


@pytest.mark.parametrize(
    ("likeliest", "drawn", "name"),
    [
        ([True, True], [False, False], "HighlyKnown"),
        ([True, False], [True, True], "MaybeKnown"),
        ([False, False], [False, True], "WeaklyKnown"),
        ([False, False], [False, False], "Unknown"),
        ([False], [], "Unknown"),
    ],
)
def test_the_category_follows_from_the_right_answers(likeliest, drawn, name):
    assert category(likeliest, drawn) == name


def test_one_set_and_no_draw_tell_what_the_likeliest_answer_tells(checkpoint):
    model, tokenizer = files.load(checkpoint)
    facts = facts_of(num_known=24, num_new=0)
    questions = known_questions(facts.known, facts.wordings)
    right = [each.exact_match for each in answer_questions(model, tokenizer, questions)]
    assert sum(right) > 0
    generator, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    found = how_well_known(model, tokenizer, [questions], samples=0)
    assert found == ["HighlyKnown" if each else "Unknown" for each in right]
    drawn = how_well_known(model, tokenizer, [questions, questions], samples=16, temperature=1.0, batch_size=5)
    assert [each == "HighlyKnown" for each in drawn] == right
    assert drawn == how_well_known(model, tokenizer, [questions] * 2, samples=16, temperature=1.0, batch_size=5)
    assert "WeaklyKnown" in drawn, "of 32 drawn answers to what the likeliest one misses some are right"
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes


def test_without_a_set_nothing_can_be_told(checkpoint):
    with pytest.raises(ValueError, match="at least one set of answered questions"):
        how_well_known(None, None, [], samples=1)

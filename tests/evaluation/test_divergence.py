"""KL divergence from a model to itself changed, against torch's own, and zero from a model to itself."""

import pytest
import tiny
import torch
from torch.distributions import Categorical, kl_divergence

from memlayer.data.qa import Question
from memlayer.evaluation.divergence import answer_distributions, kl_divergences, spread


def questions(number):
    return [Question(f"Where is town {n}?", ("land, " * (n + 1),), "f", "new", "seen") for n in range(number)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def llama(tokenizer):
    model = tiny.decoder(1)
    model.resize_token_embeddings(len(tokenizer))
    return model


def test_it_is_torchs_kl_at_the_positions_that_predict_the_answer(llama, tokenizer):
    asked = questions(3)
    before = answer_distributions(llama, tokenizer, asked, batch_size=2)
    assert kl_divergences(before, before) == [0.0] * 3
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = answer_distributions(llama, tokenizer, asked)
    expected = [
        kl_divergence(Categorical(logits=a), Categorical(logits=b)).mean().item() for a, b in zip(before, after)
    ]
    assert kl_divergences(before, after) == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0
    with pytest.raises(ValueError, match="zip"):
        kl_divergences(before, after[:2])


def test_distributions_do_not_depend_on_the_batch_and_end_with_the_answer(llama, tokenizer):
    asked = questions(3)
    one = answer_distributions(llama, tokenizer, asked, batch_size=1)
    other = answer_distributions(llama, tokenizer, asked, batch_size=3)
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours.exp().sum(1), torch.ones(len(ours)))
    assert len(one[0]) < len(one[1]) < len(one[2])


def test_many_questions_are_thinned_evenly():
    asked = questions(7)
    assert spread(asked, 3) == [asked[0], asked[2], asked[4]]
    assert spread(asked, 9) == asked
    assert spread([]) == []

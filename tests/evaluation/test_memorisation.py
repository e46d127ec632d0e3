"""The n-gram score against loops over all n-grams, and that it rises before texts come out verbatim."""

from statistics import fmean

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlayer.evaluation.memorisation import LENGTHS, memorised, ngram_score

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def by_brute_force(written, reference, lengths):
    shares = []
    for length in lengths:
        unused = [written[place : place + length] for place in range(len(written) - length + 1)]
        asked = [reference[place : place + length] for place in range(len(reference) - length + 1)]
        found = 0
        for gram in asked:
            if gram in unused:
                unused.remove(gram)
                found += 1
        if asked:
            shares.append(found / len(asked))
    return sum(shares) / len(shares)


@given(TOKENS, st.lists(st.integers(0, 2), min_size=3, max_size=12), st.sets(st.integers(3, 6), max_size=3))
def test_the_score_is_the_share_of_the_references_ngrams(written, reference, more):
    lengths = sorted({3, *more})
    score = ngram_score(written, reference, lengths)
    assert score == pytest.approx(by_brute_force(written, reference, lengths))
    assert 0 <= score <= ngram_score(reference, reference, lengths) == 1


@pytest.mark.parametrize(("reference", "lengths"), [([1, 2, 3], (4, 5)), ([], (1,)), ([1, 2], ()), ([1, 2], (0, 1))])
def test_a_reference_without_ngrams_has_no_score(reference, lengths):
    with pytest.raises(ValueError, match="has no n-grams of lengths"):
        ngram_score([1, 2, 3, 4, 5], reference, lengths)


def test_the_score_reaches_its_threshold_before_texts_come_out_verbatim():
    model = tiny.decoder()
    texts_BL = torch.randint(4, tiny.VOCAB, (8, 40), generator=torch.Generator().manual_seed(1))
    texts_BL[:, 12] = model.config.eos_token_id  # texts go on behind end tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scores, verbatim = [], []
    for step in range(52):
        model(input_ids=texts_BL, labels=texts_BL).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 20 and step % 4 == 3:
            found = memorised(model, texts_BL.tolist(), 6)
            assert all(each.score == 1 for each in found if each.verbatim)
            scores.append(fmean(each.score for each in found))
            verbatim.append(fmean(each.verbatim for each in found))
    assert verbatim[-1] == 1, "by then the texts are known by heart"
    first_score, first_verbatim = (next(i for i, x in enumerate(each) if x >= 0.2) for each in (scores, verbatim))
    assert first_score < first_verbatim


def test_texts_of_different_lengths_score_as_each_alone_and_leave_the_model_as_it_was():
    model = tiny.decoder().train()
    texts = [list(range(4, 4 + length)) for length in (10, 17, 12)]
    together = memorised(model, texts, 4, batch_size=2)
    assert together == [memorised(model, [text], 4)[0] for text in texts]
    assert model.training


@pytest.mark.parametrize(
    ("texts", "prefix", "words"),
    [
        ([[5] * 9], 6, "need texts of 10"),
        ([[5] * 9], 0, "a prefix of 0"),
        ([[5] * 65], 6, "64 positions"),
        ([], 1, "the shortest has 0"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused(texts, prefix, words):
    assert min(LENGTHS) == 4
    with pytest.raises(ValueError, match=words):
        memorised(tiny.decoder(), texts, prefix)

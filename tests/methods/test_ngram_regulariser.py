"""The n-gram penalty against loops over windows; it is nothing at the start, and nothing reaches exempt tokens."""

import math
from statistics import fmean

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.evaluation.memorisation import memorised
from memlayer.methods.ngram_regulariser import NGramRegulariser, ngram_penalty

LENGTHS = (12, 9, 7, 12)


def by_brute_force(log_p, reference, counted, n, margin):
    gains = []
    for row in range(len(log_p)):
        for first in range(log_p.shape[1] - n + 1):
            window = range(first, first + n)
            if all(counted[row, place] for place in window):
                now, before = (math.exp(sum(float(x[row, p]) for p in window) / n) for x in (log_p, reference))
                gains.append(max(0.0, now - before - margin))
    return fmean(gains) if gains else None


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 5), st.floats(0, 0.9))
def test_the_penalty_is_the_mean_over_windows(seed, n, margin):
    generator = torch.Generator().manual_seed(seed)
    log_p, reference = (torch.rand(2, 3, 6, generator=generator) + 1e-6).log()
    counted = torch.rand(3, 6, generator=generator) < 0.8
    expected = by_brute_force(log_p, reference, counted, n, margin)
    found = ngram_penalty(log_p, reference, counted, n, margin)
    if expected is None:
        assert found is None
    else:
        assert float(found) == pytest.approx(expected, abs=1e-6)


def taught_a_little(model, batch, steps=10, term=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        out = model(**tiny.inputs(batch))
        extra = term.loss(model, batch, out.logits) if term else None
        (out.loss if extra is None else out.loss + extra).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def regulariser_of(model, batch, **more):
    term = NGramRegulariser([batch], **more)
    term.begin(model)
    return term


def test_at_the_untouched_model_it_is_zero_and_pulls_nowhere():
    model, batch = tiny.decoder(), tiny.batch(LENGTHS)
    term = regulariser_of(model, batch)
    loss = term.loss(model, batch, model(**tiny.inputs(batch)).logits)
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters())


def test_exempt_tokens_and_padding_get_no_gradient_and_the_others_do():
    model, batch = tiny.decoder(), tiny.batch(LENGTHS)
    term = regulariser_of(model, batch, n=2, margin=0.0)
    logits = taught_a_little(model, batch)(**tiny.inputs(batch)).logits.detach().requires_grad_()
    term.loss(model, batch, logits).backward()
    reached_BL = logits.grad.abs().sum(-1) > 0
    there_BL, exempt_BL = batch["attention_mask"].bool(), batch["answer_mask"].bool()
    assert not reached_BL[exempt_BL].any()
    assert not reached_BL[:, :-1][~there_BL[:, 1:]].any()
    assert reached_BL[~exempt_BL & there_BL].any()
    everything = regulariser_of(tiny.decoder(), batch, n=2, margin=0.0, exempt_answers=False)
    logits.grad = None
    everything.loss(model, batch, logits).backward()
    assert (logits.grad.abs().sum(-1) > 0)[exempt_BL].any()


def test_where_the_padding_is_and_which_logits_are_kept_changes_nothing_else():
    model, batch = tiny.decoder(), tiny.batch((9, 9))
    term = regulariser_of(model, batch, n=2, margin=0.0)
    taught_a_little(model, batch)
    logits = model(**tiny.inputs(batch)).logits
    whole = term.loss(model, batch, logits)
    padded = {key: torch.nn.functional.pad(tensor, (3, 0)) for key, tensor in batch.items()}
    assert torch.equal(term.loss(model, padded, torch.nn.functional.pad(logits, (0, 0, 3, 0))), whole)
    assert torch.equal(term.loss(model, padded, logits), whole)
    assert term.loss(model, batch, logits[:, -2:]) is None, "only answer tokens are left"


def test_it_halves_what_is_memorised_of_texts():
    texts_BL = torch.randint(4, tiny.VOCAB, (8, 20), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": texts_BL, "attention_mask": torch.ones_like(texts_BL), "labels": texts_BL}
    model = tiny.decoder()
    term = regulariser_of(model, batch, weight=20.0, exempt_answers=False)
    plain, held = taught_a_little(tiny.decoder(), batch, 60), taught_a_little(model, batch, 60, term)
    scores = [fmean(each.score for each in memorised(each, texts_BL.tolist(), 6)) for each in (plain, held)]
    assert scores[1] < scores[0] / 2
    assert scores[0] > 0.9


def test_what_it_has_no_reference_of_is_refused():
    model, batch = tiny.decoder(), tiny.batch(LENGTHS)
    term = regulariser_of(model, batch)
    with pytest.raises(ValueError, match="none of the 4 that the reference was taken of"):
        term.loss(model, tiny.batch(LENGTHS, seed=1), torch.zeros(4, 12, tiny.VOCAB))
    with pytest.raises(ValueError, match="no 'answer_mask'"):
        term.loss(model, tiny.inputs(batch), torch.zeros(4, 12, tiny.VOCAB))
    with pytest.raises(ValueError, match="margin=1"):
        NGramRegulariser([], margin=1.0)

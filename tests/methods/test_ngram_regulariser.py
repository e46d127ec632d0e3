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


def examples_of(batch):
    """The sequences of a batch of ``tiny.batch``, whose answers are their last two tokens."""
    rows = [ids_L[there_L].tolist() for ids_L, there_L in zip(batch["input_ids"], batch["attention_mask"].bool())]
    return [{"input_ids": row, "answer_start": len(row) - 2, "length": len(row)} for row in rows]


def regulariser_of(model, batch, **more):
    term = NGramRegulariser(examples_of(batch), tiny.PAD, batch_size=3, **more)
    term.begin(model)
    return term


def test_at_the_untouched_model_it_is_zero_and_pulls_nowhere():
    model, batch = tiny.decoder(), tiny.batch(LENGTHS)
    term = regulariser_of(model, batch, exempt_answers=False)
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


def test_it_is_the_penalty_of_what_the_untouched_model_said():
    batch = tiny.batch(LENGTHS)
    term = regulariser_of(tiny.decoder(), batch, n=3, margin=0.05, weight=2.0)
    model = taught_a_little(tiny.decoder(), batch)
    with torch.no_grad():
        logits, before = (each(**tiny.inputs(batch)).logits for each in (model, tiny.decoder()))
    now, reference = (
        each.log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0] for each in (logits, before)
    )
    counted = torch.arange(1, 12) < torch.tensor(LENGTHS)[:, None] - 2
    expected = 2 * by_brute_force(now, reference, counted, 3, 0.05)
    assert float(term.loss(model, batch, logits)) == pytest.approx(expected, rel=1e-5)  # float32
    assert expected > 0.01


def test_where_the_padding_is_and_which_logits_are_kept_changes_nothing_else():
    model, batch = tiny.decoder(), tiny.batch((9, 9))
    term = regulariser_of(model, batch, n=2, margin=0.0)
    taught_a_little(model, batch)
    logits = model(**tiny.inputs(batch)).logits
    whole = term.loss(model, batch, logits)
    padded = {key: torch.nn.functional.pad(tensor, (3, 0)) for key, tensor in batch.items()}
    assert torch.equal(term.loss(model, padded, torch.nn.functional.pad(logits, (0, 0, 3, 0))), whole)
    assert torch.equal(term.loss(model, padded, logits), whole)
    assert term.loss(model, batch, logits[:, -3:]) is None, "only answer tokens are left"
    assert term.loss(model, batch, logits[:, -1:]) is None


def test_a_text_has_no_answer_to_be_exempt():
    model, text = tiny.decoder(), {"input_ids": list(range(5, 15)), "answer_start": 1, "length": 10}
    batch = {"input_ids": torch.tensor([text["input_ids"]]), "attention_mask": torch.ones(1, 10, dtype=torch.int64)}
    term = NGramRegulariser([text], tiny.PAD)
    term.begin(model)
    assert term.loss(model, batch, model(**batch).logits) == 0


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
    with pytest.raises(ValueError, match="margin=1"):
        NGramRegulariser([], tiny.PAD, margin=1.0)

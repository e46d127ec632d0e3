"""Documents of one window do not hear each other, or the family is refused by its name."""

import pytest
import torch
from families import FAMILIES, MIXTURES, decoder, learned, logits, tokens, with_memory

from memlayer.decoders.packed import check_keeps_apart, leak_between_documents

LENGTHS = (9, 14, 1, 5)  # longer and shorter than a sliding window; one token alone
FLOAT32 = 2e-5  # of logits up to 6: sums in another order


def packed(documents):
    """A window of several documents, as memlayer/data/packing.py makes it."""
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in documents])
    return {"input_ids": torch.cat(documents, 1), "position_ids": positions[None], "use_cache": False}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_a_document_in_a_window_has_the_logits_that_it_has_alone(family, attention):
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no such attention for it")
    model = decoder(family)
    model.set_attn_implementation(attention)
    model = learned(with_memory(model, num_keys=6, top_k=6))  # all are read: no tie decides which
    documents = [tokens(1, length, seed=seed) for seed, length in enumerate(LENGTHS)]
    alone = torch.cat([logits(model, ids, use_cache=False) for ids in documents], 1)
    window = packed(documents)
    assert (logits(model, **window) - alone).abs().max() < FLOAT32 * alone.abs().max()
    other = packed([tokens(1, LENGTHS[0], seed=9), *documents[1:]])
    assert torch.equal(logits(model, **other)[:, LENGTHS[0] :], logits(model, **window)[:, LENGTHS[0] :])
    check_keeps_apart(model)
    assert leak_between_documents(model) < FLOAT32


def test_position_numbers_are_what_keeps_documents_apart():
    model, documents = decoder("llama"), [tokens(1, length) for length in LENGTHS]
    alone = torch.cat([logits(model, ids) for ids in documents], 1)
    assert (logits(model, torch.cat(documents, 1)) - alone).abs().max() > 0.1


def test_a_family_whose_state_runs_on_is_refused_by_name():
    model = decoder("falcon_h1").train()
    with pytest.raises(
        ValueError, match=r"falcon_h1 does not keep documents of one window apart: .* text.together=false"
    ):
        check_keeps_apart(model)
    assert model.training, "left as it was"


def test_a_family_that_takes_no_position_numbers_is_refused_by_name():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)).eval()
    with pytest.raises(ValueError, match=r"bloom .*text\.together=false"):
        check_keeps_apart(model)

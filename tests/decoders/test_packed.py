"""Documents of one window do not hear each other, or the family is refused by its name."""

import pytest
import torch
from families import FAMILIES, MIXTURES, PECULIAR, decoder, learned, logits, tokens, with_memory
from transformers import AutoModelForCausalLM, BloomConfig

from memlayer.decoders.packed import check_keeps_apart, distance_from_alone, hears_others

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
    assert distance_from_alone(model) < FLOAT32


def test_position_numbers_are_what_keeps_documents_apart():
    model, documents = decoder("llama"), [tokens(1, length) for length in LENGTHS]
    alone = torch.cat([logits(model, ids) for ids in documents], 1)
    assert (logits(model, torch.cat(documents, 1)) - alone).abs().max() > 0.1


def plain(kind, **settings):
    """A model as it is when it has just been made: next to nothing of what it is depends on its input yet."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**settings))


def test_a_family_whose_state_runs_on_is_refused_by_name_though_it_has_learned_nothing_yet():
    model = plain(*PECULIAR["falcon_h1"][:1], **PECULIAR["falcon_h1"][1]).train()
    assert distance_from_alone(model) < 1e-3, "so little that only its gradient shows it"
    assert hears_others(model)
    with pytest.raises(
        ValueError, match=r"falcon_h1 does not keep documents of one window apart, .* text.together=false"
    ):
        check_keeps_apart(model)
    assert model.training, "left as it was"


def test_a_family_that_takes_no_position_numbers_is_refused_by_name():
    model = plain(BloomConfig, vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    with pytest.raises(ValueError, match=r"bloom .*text\.together=false"):
        check_keeps_apart(model)


def test_a_model_whose_positions_go_on_is_refused_by_name(monkeypatch):
    model = plain(*FAMILIES["gpt2"][:1], **FAMILIES["gpt2"][1])
    check_keeps_apart(model)
    table = model.transformer.wpe
    monkeypatch.setattr(table, "forward", lambda ids: table.weight[torch.arange(ids.shape[-1])][None])
    with pytest.raises(ValueError, match="gpt2 does not number the positions of a window anew with each document"):
        check_keeps_apart(model)

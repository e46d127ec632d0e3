"""Logits of the last positions: the same numbers, of one product with the head."""

import pytest
import tiny
import torch
from families import FAMILIES, decoder, tokens

from memlayer.evaluation.kept_logits import can_keep_logits, kept_logits


def test_the_head_multiplies_the_kept_positions_at_once_and_says_what_it_says_of_all():
    model = tiny.decoder().eval().requires_grad_(False)
    ids_BL = torch.randint(5, 30, (3, 7))
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _head, inputs: seen.append(inputs[0]))
    whole_BLC = model(input_ids=ids_BL).logits
    kept_BKC = model(input_ids=ids_BL, **kept_logits(model.forward, 4, 7, ids_BL.device)).logits
    torch.testing.assert_close(kept_BKC, whole_BLC[:, 4:])
    assert seen[1].shape[:2] == (3, 3)
    assert seen[1].is_contiguous()  # a view with gaps is multiplied row by row


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_at_the_kept_positions_what_it_says_of_all(family):
    model, ids_BL = decoder(family), tokens(2, 9)
    with torch.no_grad():
        whole_BLC = model(input_ids=ids_BL).logits
        kept_BKC = model(input_ids=ids_BL, **kept_logits(model.forward, 5, 9, ids_BL.device)).logits
    torch.testing.assert_close(kept_BKC, whole_BLC[:, 5:])


def test_a_decoder_that_takes_a_number_alone_is_told_a_number():
    def forward(input_ids, logits_to_keep: int | None = 0): ...

    def without(input_ids): ...

    assert can_keep_logits(forward)
    assert not can_keep_logits(without)
    assert kept_logits(forward, 4, 7, torch.device("cpu")) == {"logits_to_keep": 3}

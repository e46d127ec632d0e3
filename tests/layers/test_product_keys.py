"""The search module: what it returns, in which order, and what it refuses."""

import pytest
import torch

from memlayer.layers.product_keys import ProductKeys


def keys(**settings):
    torch.manual_seed(0)
    return ProductKeys(**{"width": 16, "num_keys": 8, "num_heads": 2, "top_k": 3, "key_width": 6, **settings})


def test_scores_and_slots_have_the_documented_shapes_and_dtypes():
    scores_THK, slots_THK = keys()(torch.randn(5, 16))
    assert scores_THK.shape == slots_THK.shape == (5, 2, 3)
    assert (scores_THK.dtype, slots_THK.dtype) == (torch.float32, torch.int64)


def test_scores_are_float32_for_a_bfloat16_module():
    scores_THK, _ = keys().bfloat16()(torch.randn(5, 16, dtype=torch.bfloat16))
    assert scores_THK.dtype == torch.float32


def test_slots_are_the_best_of_all_pairs_best_first():
    module, hidden_TD = keys(top_k=8), torch.randn(20, 16)
    scores_THK, slots_THK = module(hidden_TD)
    queries = module.norm((hidden_TD @ module.query.weight.T).view(20, 2, 2, 3))
    first, second = (torch.einsum("thq,hnq->thn", queries[:, :, c], module.half_keys[:, c]) for c in (0, 1))
    every_THN = (first[..., :, None] + second[..., None, :]).flatten(-2)
    expected = every_THN.topk(8, dim=-1)
    assert torch.equal(slots_THK, expected.indices)
    torch.testing.assert_close(scores_THK, expected.values, rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_the_scale_of_the_hidden_state():
    module, hidden_TD = keys(), torch.randn(5, 16) * 100
    (scores, slots), (scaled, scaled_slots) = module(hidden_TD), module(hidden_TD * 1000)
    assert torch.equal(slots, scaled_slots)
    torch.testing.assert_close(scores, scaled, rtol=1e-3, atol=1e-3)


def test_every_parameter_gets_a_gradient():
    module = keys()
    scores_THK, _ = module(torch.randn(5, 16))
    (scores_THK**2).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 9}, "top_k is 9, must be between 1 and num_keys = 8"),
        ({"top_k": 0}, "top_k is 0, must be between 1 and num_keys = 8"),
        ({"key_width": 5}, "key_width is 5, must be even"),
        ({"key_width": 0}, "key_width is 0, must be even and positive"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_their_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        keys(**settings)

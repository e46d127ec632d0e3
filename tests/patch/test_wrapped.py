"""A patch is applied to and reverted from a model in whatever wrapper it is trained or run."""

import pytest
import tiny
import torch
from patch_cases import odd_patch
from peft import LoraConfig, get_peft_model

from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.patch import patches


def with_lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("wrap", [with_lora, torch.compile, lambda model: torch.compile(with_lora(model))])
def test_a_patch_goes_into_a_wrapped_model_and_out_of_it(wrap):
    bare = tiny.memory_model()
    patch = odd_patch(bare)
    wrapped = wrap(bare)
    before = state_fingerprint(wrapped)
    patch.apply(wrapped)
    assert state_fingerprint(wrapped) != before
    with pytest.raises(ValueError, match="applied already"):
        patch.apply(wrapped)
    patch.revert(wrapped)
    with patches(wrapped, [patch]):
        assert bare.config.memory_patches == [patch.fingerprint]
    assert state_fingerprint(wrapped) == before
    assert not hasattr(bare.config, "memory_patches")


def test_another_weight_below_an_adapter_is_another_model():
    model = tiny.memory_model()
    patch = odd_patch(model)
    model = with_lora(model)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.add_(1)
    with pytest.raises(ValueError, match="other weights outside the memory"):
        patch.apply(model)

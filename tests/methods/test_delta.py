"""A delta goes on and off to the last bit, and nowhere else than where it belongs."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.methods.delta import SparseDelta

NAME = "model.layers.0.mlp.up_proj.weight"


def changed_model(dtype=torch.float32, places=(3, 7, 100)):
    """A model of which some numbers were changed, its fingerprint before, and the delta."""
    model = tiny.decoder().to(dtype)
    before, weight = state_fingerprint(model), model.get_parameter(NAME)
    index_C = torch.tensor(places, dtype=torch.int32)
    originals = {NAME: weight.detach().view(-1)[index_C]}
    with torch.no_grad():
        weight.view(-1)[index_C[:-1]] += 0.1
    return model, before, SparseDelta.between({NAME: weight}, {NAME: index_C}, originals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_delta_goes_off_and_on_to_the_last_bit(tmp_path, dtype):
    model, before, delta = changed_model(dtype)
    after = state_fingerprint(model)
    assert delta.num_numbers == 2, "what did not change is left out"
    delta.save(tmp_path / "delta.safetensors")
    loaded = SparseDelta.load(tmp_path / "delta.safetensors")
    assert loaded.tensors[NAME].indices.dtype == torch.int32
    loaded.revert(model)
    assert state_fingerprint(model) == before != after
    loaded.apply(model)
    assert state_fingerprint(model) == after


def test_a_zero_that_only_changed_its_sign_comes_back():
    model = tiny.decoder()
    weight, index_C = model.get_parameter(NAME), torch.tensor([5], dtype=torch.int32)
    with torch.no_grad():
        weight.view(-1)[5] = 0.0
        before, originals = state_fingerprint(model), {NAME: weight.view(-1)[index_C]}
        weight.view(-1)[5] = -0.0
    SparseDelta.between({NAME: weight}, {NAME: index_C}, originals).revert(model)
    assert state_fingerprint(model) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: model.get_parameter(NAME).data.view(-1)[3].add_(1), "1 of 2 numbers of .* are not the delta's"),
        (lambda model: model.bfloat16(), "are torch.float32, the model's are torch.bfloat16"),
        (lambda model: setattr(model.model.layers[0].mlp, "up_proj", torch.nn.Identity()), "which the model does not"),
        (
            lambda model: setattr(model.model.layers[0].mlp, "up_proj", torch.nn.Linear(2, 2)),
            "changes number 7 of .*, the model's has 4",
        ),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(change, named):
    model, _, delta = changed_model()
    change(model)
    before = state_fingerprint(model)
    with pytest.raises(ValueError, match=named):
        delta.revert(model)
    assert state_fingerprint(model) == before


def test_a_file_that_is_no_delta_is_refused(tmp_path):
    tiny.decoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no sparse delta: its format is 'pt'"):
        SparseDelta.load(tmp_path / "model.safetensors")
    (tmp_path / "cut").write_bytes(b"12")
    with pytest.raises(ValueError, match="cut is damaged"):
        SparseDelta.load(tmp_path / "cut")


@settings(deadline=None)
@given(st.sets(st.integers(0, 511), min_size=1, max_size=40), st.integers(0, 2**32))
def test_whatever_changed_is_undone(places, seed):
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(16, 32, bias=False)
    before = model.weight.detach().clone()
    index_C = torch.tensor(sorted(places), dtype=torch.int32)
    with torch.no_grad():
        model.weight.view(-1)[index_C] += torch.randint(-1, 2, index_C.shape, generator=generator)
    delta = SparseDelta.between({"weight": model.weight}, {"weight": index_C}, {"weight": before.view(-1)[index_C]})
    assert delta.num_numbers == int((model.weight != before).sum())
    after = model.weight.detach().clone()
    delta.revert(model)
    assert torch.equal(model.weight, before)
    delta.apply(model)
    assert torch.equal(model.weight, after)

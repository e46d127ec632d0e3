"""Memory in every decoder family: what attaching changes, what removing gives back, and what logits depend on."""

import pytest
import tiny
import torch
from families import FAMILIES, PAD, decoder, generate, learned, logits, settings_of, tokens, train, with_memory
from transformers import AutoModelForCausalLM

from memlayer.decoders.attach import memory_layers, memory_parameters, memory_tables, remove_memory

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
BOTH_MODES = pytest.mark.parametrize("mode", ["replace", "add"])
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

# float32: the same products in another matrix shape may be summed in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def memory_model(family, mode, dtype=torch.float32, **settings):
    """A model whose logits depend on every memory parameter."""
    return learned(with_memory(decoder(family, dtype=dtype), mode, **settings))


@EVERY_FAMILY
@BOTH_DTYPES
def test_memory_beside_the_feed_forward_blocks_changes_no_logit(family, dtype):
    model = decoder(family, dtype=dtype)
    before = logits(model, tokens(2, 12))
    assert torch.equal(before, logits(with_memory(model, "add"), tokens(2, 12)))


@EVERY_FAMILY
@BOTH_MODES
def test_logits_depend_on_what_each_memory_layer_reads(family, mode):
    model = memory_model(family, mode, share=False)
    before = logits(model, tokens(2, 12))
    for table in memory_tables(model).values():
        kept = table.weight.detach().clone()
        table.weight.data.neg_()
        assert (before - logits(model, tokens(2, 12))).abs().max() > 0.01
        table.weight.data.copy_(kept)
    assert torch.equal(before, logits(model, tokens(2, 12)))


@EVERY_FAMILY
@BOTH_MODES
def test_memory_parameters_are_all_that_attaching_added(family, mode):
    base = decoder(family)
    names = {name for name, _ in base.named_parameters()}
    model = with_memory(base, mode)
    kept = {name.replace(".mlp.ffn.", ".mlp.") for name, _ in model.named_parameters()}
    added = {name for name, _ in model.named_parameters()} - names
    assert set(memory_parameters(model)) == {name for name in added if ".mlp.ffn." not in name}
    replaced = {name for name in names if ".0.mlp." in name or ".2.mlp." in name}
    assert names - kept == (replaced if mode == "replace" else set())
    assert len(memory_layers(model)) == 2


@EVERY_FAMILY
@BOTH_MODES
def test_a_model_made_from_a_config_alone_has_memory_that_starts_as_attached_memory_does(family, mode):
    attached = with_memory(decoder(family), mode)
    torch.manual_seed(1)
    made = AutoModelForCausalLM.from_config(attached.config)
    assert type(made) is type(attached)
    expected = {name: parameter.std() for name, parameter in memory_parameters(attached).items()}
    for name, parameter in memory_parameters(made).items():
        # The spreads of two samples of 72 random numbers or more.
        torch.testing.assert_close(parameter.std(), expected[name], rtol=0.5, atol=0.0)


@EVERY_FAMILY
@BOTH_MODES
@BOTH_DTYPES
def test_removing_memory_gives_the_original_back_to_the_bit(family, mode, dtype):
    base, model = decoder(family, dtype=dtype), decoder(family, dtype=dtype)
    with_memory(model, mode)
    model.requires_grad_(False)
    for parameter in memory_parameters(model).values():
        parameter.requires_grad_(True)
    train(model, memory_parameters(model).values())
    assert not torch.equal(logits(model, tokens(2, 12)), logits(base, tokens(2, 12)))
    assert remove_memory(model) is model
    assert_same_model(model, base)
    assert torch.equal(generate(model, tokens(2, 5)), generate(base, tokens(2, 5)))


def assert_same_model(model, base):
    """Class, config, module tree, every tensor and the logits are the same."""
    assert type(model) is type(base)
    assert type(model.config) is type(base.config)
    assert settings_of(model.config) == settings_of(base.config)
    assert [(name, type(m)) for name, m in model.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(logits(model, tokens(2, 12)), logits(base, tokens(2, 12)))


@EVERY_FAMILY
def test_all_parts_of_a_model_see_one_config(family):
    model = decoder(family)
    base_config = model.config
    for change in (with_memory, remove_memory):
        change(model)
        assert model.config is not base_config, "somebody else's model may have been built from it"
        assert not [name for name, m in model.named_modules() if getattr(m, "config", model.config) is not model.config]


@BOTH_MODES
def test_a_model_given_back_can_be_saved_as_if_memory_had_never_been_there(mode, tmp_path):
    base = decoder("qwen3")
    base.save_pretrained(tmp_path / "base")
    remove_memory(with_memory(base, mode)).save_pretrained(tmp_path / "given_back")
    for path in sorted((tmp_path / "base").iterdir()):
        assert (tmp_path / "given_back" / path.name).read_bytes() == path.read_bytes(), path.name
    assert_same_model(*(AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("given_back", "base")))


@BOTH_MODES
def test_memory_can_be_attached_again_where_it_was_removed(mode):
    model, other = decoder("gpt2"), decoder("gpt2")
    remove_memory(with_memory(model, mode))
    once, twice = learned(with_memory(other, mode)), learned(with_memory(model, mode))
    assert type(once) is type(twice)
    assert torch.equal(logits(once, tokens(2, 12)), logits(twice, tokens(2, 12)))


@EVERY_FAMILY
@BOTH_MODES
def test_logits_of_a_prefix_do_not_change_with_what_follows(family, mode):
    model, ids = memory_model(family, mode), tokens(2, 12)
    changed = torch.cat([ids[:, :7], tokens(2, 5, seed=1)], dim=1)
    before, after = logits(model, ids), logits(model, changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:], **CLOSE)
    torch.testing.assert_close(before[:, :7], logits(model, ids[:, :7]), **CLOSE)


def padded_batch(lengths, padding_side):
    """Random rows of these lengths, and the mask and positions that leave the padding out."""
    width = max(lengths)
    place = torch.arange(width).expand(len(lengths), width)
    length = torch.tensor(lengths)[:, None]
    mask = (place < length if padding_side == "right" else place >= width - length).long()
    ids = tokens(len(lengths), width).masked_fill(mask == 0, PAD)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@EVERY_FAMILY
@BOTH_MODES
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_of_a_sequence_do_not_change_with_the_rest_of_the_batch(family, mode, padding_side):
    model, batch = memory_model(family, mode), padded_batch((5, 12, 9), padding_side)
    together = logits(model, **batch)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = logits(model, batch["input_ids"][row][mask][None])
        torch.testing.assert_close(together[row][mask][None], alone, **CLOSE)


@EVERY_FAMILY
@BOTH_MODES
def test_generation_with_a_cache_equals_generation_without(family, mode):
    model = memory_model(family, mode)
    cached, full = (generate(model, tokens(2, 7), use_cache=use_cache) for use_cache in (True, False))
    assert cached.shape == (2, 8)
    assert torch.equal(cached, full)


@EVERY_FAMILY
@BOTH_MODES
def test_prompts_padded_on_the_left_are_continued_as_each_alone(family, mode):
    model, batch = memory_model(family, mode), padded_batch((4, 9, 6), "left")
    mask = batch["attention_mask"]
    together = generate(model, batch["input_ids"], attention_mask=mask)
    alone = [generate(model, ids[kept.bool()][None]) for ids, kept in zip(batch["input_ids"], mask)]
    assert torch.equal(together, torch.cat(alone))


def gradients(model, *micro_batches):
    """Gradient of the mean loss over micro-batches, by name; a table's made dense."""
    model.zero_grad()
    for ids in micro_batches:
        (model(input_ids=ids, labels=ids).loss / len(micro_batches)).backward()
    return {name: p.grad.to_dense() for name, p in model.named_parameters()}


@EVERY_FAMILY
@BOTH_MODES
def test_activation_checkpointing_does_not_change_a_gradient(family, mode):
    model = memory_model(family, mode).train()
    expected = gradients(model, tokens(2, 10))
    calls = []
    for layer in memory_layers(model).values():
        layer.keys.register_forward_hook(lambda *_: calls.append(1))
    tiny.checkpoint_activations(model)
    found = gradients(model, tokens(2, 10))
    assert len(calls) == 4, "each of the two layers runs again in the backward pass"
    assert all(gradient.any() for gradient in expected.values() if gradient.ndim > 1)
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name


@EVERY_FAMILY
@BOTH_MODES
def test_accumulated_gradients_equal_those_of_one_large_batch(family, mode):
    model, ids = memory_model(family, mode).train(), tokens(4, 10)
    whole = gradients(model, ids)
    accumulated = gradients(model, *ids.split(1))
    for name, gradient in whole.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(accumulated[name] / scale, gradient / scale, **CLOSE)

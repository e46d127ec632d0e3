"""Any decoder with memory is saved and loaded as Hugging Face models are: every bit, in a fresh process.

The matrix has no hole: each of the 12 families comes tied and untied, in float32 and in bfloat16, which its cells
show of themselves.
"""

import json
from itertools import product

import pytest
import tiny
import torch
from commands import printed_by
from families import (
    FAMILIES,
    MIXTURES,
    PECULIAR,
    decoder,
    described,
    generate,
    learned,
    logits,
    settings_of,
    tokens,
    train,
    with_memory,
)
from reload import FOUND, load_elsewhere
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitNetQuantConfig

from memlayer.decoders.attach import memory_parameters, memory_tables, remove_memory

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
BOTH_MODES = pytest.mark.parametrize("mode", ["replace", "add"])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CELLS = list(product(("shared", "per_layer"), ("tied", "untied"), DTYPES))


@EVERY_FAMILY
@BOTH_MODES
def test_a_trained_model_is_the_same_to_the_bit_in_a_fresh_process(family, mode, tmp_path):
    expected, memory = {}, {}
    for cell in CELLS:
        model = attached_and_trained(family, mode, *cell)
        model.save_pretrained(tmp_path / "-".join(cell))
        expected[cell], memory[cell] = described(model), memory_parameters(model)
    load_elsewhere([tmp_path / "-".join(cell) for cell in CELLS])
    for cell in CELLS:
        _, tied, dtype = cell
        found = torch.load(tmp_path / "-".join(cell) / FOUND)
        assert not differences(found, expected[cell]), cell
        assert found["tied"] == (tied == "tied"), cell
        dtypes = {name: tensor.dtype for name, tensor in found["state"].items()}
        assert {dtypes[name] for name in dtypes if name in memory[cell]} == {torch.float32}, cell
        assert {dtypes[name] for name in dtypes if name not in memory[cell]} == {DTYPES[dtype]}, cell


@EVERY_FAMILY
def test_the_base_model_alone_has_the_memory_too(family, tmp_path):
    model = learned(with_memory(decoder(family), "add"))
    model.save_pretrained(tmp_path / "whole")
    alone = AutoModel.from_pretrained(tmp_path / "whole")
    alone.save_pretrained(tmp_path / "alone")
    with torch.no_grad():
        expected = model.base_model(tokens(2, 10)).last_hidden_state
        for base in (alone, AutoModel.from_pretrained(tmp_path / "alone")):
            assert torch.equal(base(tokens(2, 10)).last_hidden_state, expected)
    for name, table in memory_tables(model).items():
        assert torch.equal(memory_tables(alone)[name.removeprefix(f"{model.base_model_prefix}.")].weight, table.weight)


def attached_and_trained(family, mode, share, tied, dtype):
    """One cell of the matrix: attach and train every parameter; all of them move."""
    base = decoder(family, tied=tied == "tied", dtype=DTYPES[dtype])
    before = logits(base, tokens(2, 10))
    model = with_memory(base, mode, share=share == "shared")
    assert torch.equal(before, logits(model, tokens(2, 10))) == (mode == "add")
    start = tiny.snapshot(model)
    train(model, model.parameters())
    assert not [name for name, tensor in model.state_dict().items() if torch.equal(tensor, start[name])]
    assert len(memory_tables(model)) == (1 if share == "shared" else 2)
    return model


def differences(found, expected):
    """What two descriptions of a model do not agree in: names of tensors, logits, tokens, class, config."""
    found, expected = ({**each["state"], **each} for each in (found, expected))
    del found["state"], expected["state"]
    in_one_only = found.keys() ^ expected.keys()
    return sorted(in_one_only or (name for name in found if differ(found[name], expected[name])))


def differ(one, other):
    return not torch.equal(one, other) if isinstance(one, torch.Tensor) else one != other


@pytest.mark.parametrize("family", [*MIXTURES, *PECULIAR])
@BOTH_MODES
def test_memory_in_other_families_is_the_same_to_the_bit(family, mode, tmp_path):
    decoder(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    original = same(base)
    model = learned(with_memory(base, mode, layers=[1]))
    model.save_pretrained(tmp_path / "with")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    assert not differences(same(loaded), same(model))
    remove_memory(model if mode == "replace" else loaded).save_pretrained(tmp_path / "given_back")
    assert not differences(same(AutoModelForCausalLM.from_pretrained(tmp_path / "given_back")), original)


LOAD_AND_SAY_HOW = """
import sys, memlayer
from transformers import AutoModelForCausalLM
config = AutoModelForCausalLM.from_pretrained(sys.argv[1]).config
print(config._experts_implementation, config._attn_implementation)
"""


def test_a_fresh_process_runs_experts_and_attention_as_the_base_does(tmp_path):
    base = decoder("mixtral")
    expected = f"{base.config._experts_implementation} {base.config._attn_implementation}"
    with_memory(base, "add").save_pretrained(tmp_path)
    assert printed_by(LOAD_AND_SAY_HOW, tmp_path).strip() == expected


def same(model):
    """What has to be equal of two models, without the time that generating takes."""
    return {"state": tiny.snapshot(model), "config": settings_of(model.config), "logits": logits(model, tokens(2, 10))}


def test_the_format_of_a_base_that_would_not_load_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="save_original_format=True"):
        with_memory(decoder("mixtral")).save_pretrained(tmp_path / "model", save_original_format=True)
    assert not (tmp_path / "model").exists()


LOAD_AS_A_USER = """
import sys, memlayer
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    print(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)
"""


def test_importing_memlayer_is_all_that_loading_needs(tmp_path):
    for family in ("llama", "gpt2"):
        with_memory(decoder(family)).save_pretrained(tmp_path / family)
    printed = tiny.run_python(LOAD_AS_A_USER, tmp_path / "llama", tmp_path / "gpt2")
    assert printed.split() == ["MemoryLlamaForCausalLM", "MemoryGPT2LMHeadModel"]


@EVERY_FAMILY
@BOTH_MODES
def test_a_table_larger_than_a_shard_lies_in_one_of_its_own(family, mode, tmp_path):
    model = learned(with_memory(decoder(family), mode, share=False))
    model.save_pretrained(tmp_path, max_shard_size=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name in memory_tables(model):
        assert list(load_file(tmp_path / index[f"{name}.weight"])) == [f"{name}.weight"]
    assert len(set(index.values())) > 10
    assert not differences(described(AutoModelForCausalLM.from_pretrained(tmp_path)), described(model))


@EVERY_FAMILY
@BOTH_MODES
def test_a_dtype_asked_for_when_loading_is_the_one_of_every_tensor(family, mode, tmp_path):
    model = learned(with_memory(decoder(family), mode))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    rounded = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert loaded.state_dict().keys() == rounded.keys()
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in loaded.state_dict().items())
    assert logits(loaded, tokens(2, 10)).dtype == torch.bfloat16


def in_two_dtypes():
    """A bfloat16 decoder with float32 memory."""
    return learned(with_memory(decoder("llama", dtype=torch.bfloat16), "add"))


@pytest.mark.parametrize("asked", [{}, {"dtype": "auto"}])
def test_memory_keeps_its_dtype_on_disk_and_on_loading(asked, tmp_path):
    model = in_two_dtypes()
    model.save_pretrained(tmp_path)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path, **asked),
        type(model).from_pretrained(tmp_path, **asked),
    ):
        assert not differences(described(loaded), described(model))
        assert loaded.model.memory[0].weight.dtype == torch.float32


@pytest.mark.parametrize("convert", [torch.nn.Module.bfloat16, torch.nn.Module.float])
def test_a_model_that_was_converted_is_loaded_as_it_was_saved(convert, tmp_path):
    model = convert(in_two_dtypes())
    model.save_pretrained(tmp_path)
    found, expected = same(AutoModelForCausalLM.from_pretrained(tmp_path)), same(model)
    # Converting rounds the frequencies of the positions too, which are in no checkpoint.
    del found["logits"], expected["logits"]
    assert not differences(found, expected)
    assert {name: t.dtype for name, t in found["state"].items()} == {n: t.dtype for n, t in expected["state"].items()}


@pytest.mark.parametrize("dtype", [torch.float16, "float32"])
def test_a_dtype_asked_for_is_that_of_memory_too_and_stays_so(dtype, tmp_path):
    model = in_two_dtypes()
    model.save_pretrained(tmp_path / "one")
    asked = getattr(torch, str(dtype).removeprefix("torch."))
    made = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=dtype),
        type(model).from_pretrained(tmp_path / "one", dtype=dtype),
        made,
    ):
        assert {p.dtype for p in loaded.parameters()} == {asked}
        loaded.save_pretrained(tmp_path / "two")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
        assert not differences(same(again), same(loaded))


def test_memory_in_two_dtypes_is_refused_before_anything_is_written(tmp_path):
    model = in_two_dtypes()
    model.model.memory.bfloat16()
    with pytest.raises(ValueError, match=r"\S+ is torch\.float32, model\.\S+ torch\.(bfloat16|float32)"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_quantising_memory_is_refused(folder):
    with pytest.raises(ValueError, match=r"would quantise the memory as well: .*load_memory"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitNetQuantConfig())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_attention_asked_for_when_loading_is_the_one_used(attention, tmp_path):
    model = learned(with_memory(decoder("llama")))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert {m.config._attn_implementation for m in loaded.modules() if hasattr(m, "config")} == {attention}
    # float32: the two sum in another order.
    torch.testing.assert_close(logits(loaded, tokens(2, 10)), logits(model, tokens(2, 10)), rtol=1e-4, atol=1e-4)


@EVERY_FAMILY
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=["auto", "cpu", "whole_model"])
def test_a_model_placed_by_a_device_map_is_the_same(family, device_map, tmp_path):
    model = learned(with_memory(decoder(family), "add"))
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert not differences(described(placed), described(model))


# The third decoder layer, which has memory.
LAYER = {"gpt2": "transformer.h.2.", "gpt_neox": "gpt_neox.layers.2."}


@EVERY_FAMILY
@BOTH_MODES
@pytest.mark.parametrize("part", ["tables", "layer"])
def test_what_is_left_on_disk_is_read_when_it_is_used(family, mode, part, tmp_path):
    model = learned(with_memory(decoder(family), mode))
    model.save_pretrained(tmp_path / "model")
    prefix = "memory." if part == "tables" else LAYER.get(family, "model.layers.2.")
    modules = sorted({name.rpartition(".")[0] for name in model.state_dict()})
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={module: "disk" if f"{module}.".startswith(prefix) else "cpu" for module in modules},
        offload_folder=tmp_path / "offloaded",
    )
    on_disk = {name for name, parameter in placed.named_parameters() if parameter.is_meta}
    assert on_disk == {name for name, _ in model.named_parameters() if name.startswith(prefix)}
    assert torch.equal(logits(placed, tokens(2, 10)), logits(model, tokens(2, 10)))
    assert torch.equal(generate(placed, tokens(2, 5)), generate(model, tokens(2, 5)))


@pytest.fixture
def folder(tmp_path):
    """A saved Llama with memory in place of the blocks of layers 0 and 2, each with a table of its own."""
    learned(with_memory(decoder("llama"), share=False)).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, change):
    """Edit config.json by calling ``change`` on what it holds."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    """Edit model.safetensors by calling ``change`` on its tensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


TABLES = "model.memory."
KEYS = "model.layers.0.mlp.keys.half_keys"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda memory: memory.update(num_slots=36), ["num_slots"]),
        (lambda memory: memory.pop("layers"), ["layers"]),
        (lambda memory: memory.update(mode="beside"), ["memory.mode", "beside"]),
        (lambda memory: memory.update(layers=[0, 3]), ["[0, 3]", "0 to 2"]),
        (lambda memory: memory.update(top_k=7), ["top_k is 7", "num_keys = 6"]),
    ],
    ids=["unknown_key", "no_layers", "unknown_mode", "no_such_layer", "too_many_reads"],
)
def test_a_memory_section_that_makes_no_sense_is_refused_by_name(folder, change, words):
    change_config(folder, lambda config: change(config["memory"]))
    assert_refused(folder, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop(KEYS), [KEYS, "missing"]),
        (lambda weights: weights.pop("model.memory.1.weight"), ["model.memory.1.weight", "missing"]),
        (lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"), ["model.layers.1.mlp.up_proj", "missing"]),
        (lambda weights: weights.update(extra=torch.zeros(1)), ["extra", "not in the model"]),
        (lambda weights: weights.update({TABLES + "2.weight": torch.zeros(3)}), [TABLES + "2", "not in the model"]),
        (lambda weights: weights.update({TABLES + "0.weight": torch.zeros(35, 12)}), [TABLES + "0", "(35, 12)"]),
        (lambda weights: weights.update({KEYS: torch.zeros(2, 2, 6, 4)}), [KEYS, "(2, 2, 6, 4)", "(2, 2, 6, 3)"]),
    ],
    ids=["no_keys", "no_table", "no_ffn", "foreign", "third_table", "short_table", "wide_keys"],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, change, words):
    change_weights(folder, change)
    assert_refused(folder, words)


def assert_refused(folder, words):
    """Loading raises a ValueError whose message has all of the words."""
    with pytest.raises(ValueError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_a_config_is_read_without_its_weights(folder):
    config = AutoConfig.from_pretrained(folder)
    assert (type(config).__name__, config.model_type, config.base_model_type) == (
        "MemoryLlamaConfig",
        "memlayer",
        "llama",
    )
    assert config.memory["layers"] == [0, 2]


@BOTH_MODES
def test_a_loaded_model_goes_on_training(mode, tmp_path):
    model = with_memory(decoder("llama"), mode)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (model, loaded):
        train(each, each.parameters())
    assert not differences(described(loaded), described(model))


def test_a_loaded_model_with_memory_beside_its_blocks_gives_the_original_back(tmp_path):
    with_memory(decoder("llama"), "add").save_pretrained(tmp_path)
    given_back = remove_memory(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert type(given_back) is type(decoder("llama"))
    assert torch.equal(logits(given_back, tokens(2, 10)), logits(decoder("llama"), tokens(2, 10)))


def test_a_loaded_model_has_no_original_of_the_blocks_that_memory_replaced(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = described(model)
    with pytest.raises(ValueError, match="memory replaced in layer 0 was not saved with the model"):
        remove_memory(model)
    assert not differences(described(model), before)

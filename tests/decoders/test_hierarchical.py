"""A hierarchical memory changes no logit when it is put in, and what one cluster learns no other cluster hears."""

import families
import pytest
import tiny
import torch
from safetensors.torch import save_file

from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.decoders.hierarchical import HierarchicalMemory
from memlayer.layers.cluster_tree import routing_agreement

SETTINGS = {"width": tiny.WIDTH, "layers": [0, 2], "sizes": (6, 4), "branching": 2, "embed_at": 1}


def texts(seed=0, number=24):
    """Random texts of 7 tokens: half of them of the first half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    low, high = ((4, 27), (27, 50)) if number > 1 else ((4, 50), (4, 50))
    ids = [torch.randint(*span, (number // 2, 7), generator=generator) for span in (low, high)]
    ids_BL = torch.cat(ids)
    return {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


@pytest.fixture
def model():
    return tiny.decoder()


@pytest.fixture
def memory(model):
    torch.manual_seed(1)
    return HierarchicalMemory(**SETTINGS).fit(model, [texts()])


def test_texts_are_compared_by_the_mean_of_the_hidden_states_that_their_mask_shows(model, memory):
    batch = texts(number=4)
    batch["attention_mask"][1, 3:] = 0
    found_BD = memory.embedded(model, batch)
    for ids_L, mask_L, found_D in zip(batch["input_ids"], batch["attention_mask"], found_BD, strict=True):
        shown_L = ids_L[mask_L.bool()]
        with torch.no_grad():
            states = model(input_ids=shown_L[None], output_hidden_states=True).hidden_states
        torch.testing.assert_close(found_D, states[1][0].mean(0), rtol=1e-4, atol=1e-5)  # float32, in a batch
    other = dict(batch, input_ids=batch["input_ids"].where(batch["attention_mask"].bool(), 9))
    assert torch.equal(memory.paths(model, other), memory.paths(model, batch)), "what the mask hides routes nothing"


@pytest.mark.parametrize("family", sorted({**families.FAMILIES, **families.MIXTURES}))
def test_no_logit_changes_when_it_is_put_in(family):
    base = families.decoder(family, tied=False)
    batch = {"input_ids": torch.randint(4, families.VOCAB, (3, 9)), "attention_mask": torch.ones(3, 9).long()}
    before, fingerprint = logits_of(base, batch), state_fingerprint(base)
    memory = HierarchicalMemory(**SETTINGS | {"width": families.WIDTH}).fit(base, [batch])
    take_off = memory.attach(base)
    assert torch.equal(logits_of(base, batch), before)
    with memory.routed(memory.paths(base, batch)):
        assert torch.equal(logits_of(base, batch), before)
        for parameter in memory.parameters():
            torch.nn.init.normal_(parameter)
        assert not torch.equal(logits_of(base, batch), before)
    take_off()
    with memory.routed(memory.paths(base, batch)):
        assert torch.equal(logits_of(base, batch), before)
    assert state_fingerprint(base) == fingerprint


def test_a_step_on_one_cluster_leaves_the_logits_of_others_as_they_were_to_the_bit(model, memory):
    batch = texts()
    memory.attach(model)
    model.requires_grad_(False)
    paths_BP = memory.paths(model, batch)
    one, other = (paths_BP[:, 0] == node for node in (0, 1))
    assert one.any(), "the tree tells the halves of the vocabulary apart"
    assert other.any()
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.1, weight_decay=0.5)
    taught = {key: tensor[one] for key, tensor in batch.items()}
    before = logits_of(model, batch)
    for _ in range(3):
        optimizer.zero_grad()
        with memory.routed(paths_BP[one]):
            model(**taught, labels=taught["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
    with memory.routed(paths_BP):
        after = logits_of(model, batch)
    assert torch.equal(after[other], before[other])
    assert (after[one] != before[one]).any(-1).all(), "every token of the cluster that was taught hears it"
    assert torch.equal(logits_of(model, batch), before), "without a path the model is as it was"


def test_of_a_memory_of_the_same_size_that_is_not_routed_others_do_hear(model, memory):
    """The control of the step above: all texts take one path."""
    batch = texts()
    memory.attach(model)
    one = memory.paths(model, batch)[:, 0] == 0
    alike_BP = torch.zeros(len(one), 2, dtype=torch.int64)
    before = logits_of(model, batch)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.1)
    taught = {key: tensor[one] for key, tensor in batch.items()}
    with memory.routed(alike_BP[one]):
        model(**taught, labels=taught["input_ids"], use_cache=False).loss.backward()
    optimizer.step()
    with memory.routed(alike_BP):
        assert (logits_of(model, batch)[~one] != before[~one]).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_to_the_bit(model, memory, tmp_path, dtype):
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter)
    memory.blocks.to(dtype)
    memory.save(tmp_path / "memory.safetensors")
    again = HierarchicalMemory.load(tmp_path / "memory.safetensors")
    batch, answers = texts(seed=3), []
    for each in (memory, again):
        take_off = each.attach(model)
        with each.routed(each.paths(model, batch)):
            answers.append(logits_of(model, batch))
        take_off()
    assert torch.equal(*answers)
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == {
        name: tensor.dtype for name, tensor in memory.state_dict().items()
    }
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert again.num_fetched == memory.num_fetched == 2 * 3 * tiny.WIDTH * (6 + 4)


def test_a_texts_first_half_takes_its_path_more_often_than_another_texts(model, memory):
    batch = texts(seed=5)
    half = {key: tensor[:, :5] for key, tensor in batch.items()}
    whole_NP, half_NP = memory.paths(model, batch), memory.paths(model, half)
    assert routing_agreement(whole_NP, whole_NP) == [1.0, 1.0]
    own, others = routing_agreement(whole_NP, half_NP), routing_agreement(whole_NP, half_NP.roll(12, 0))
    assert own[0] > others[0]
    assert own[1] > others[1]


def test_what_does_not_fit_is_refused(model, memory, tmp_path):
    with pytest.raises(ValueError, match=r"layers are \[1, 1\]: name one or more, each once"):
        HierarchicalMemory(**SETTINGS | {"layers": [1, 1]})
    with pytest.raises(ValueError, match=r"for layers \[0, 3\] of width 16, the model has layers 0 to 2 of width 16"):
        HierarchicalMemory(**SETTINGS | {"layers": [0, 3]}).attach(model)
    with pytest.raises(ValueError, match="embed_at is 9, the decoder has 3 layers"):
        HierarchicalMemory(**SETTINGS | {"embed_at": 9}).embedded(model, texts())
    batch = texts()
    batch["attention_mask"][2] = 0
    with pytest.raises(ValueError, match="1 of 24 texts have no token to be routed by"):
        memory.paths(model, batch)
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(1)}, other)
    with pytest.raises(ValueError, match=r"other\.safetensors holds no hierarchical memory"):
        HierarchicalMemory.load(other)

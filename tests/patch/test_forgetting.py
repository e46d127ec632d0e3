"""A patch turned round makes what it taught less likely, and new answers are learned on top of it."""

import pytest
import tiny
import torch
from finetuning import learn

from memlayer.patch import MemoryPatch
from memlayer.patch.forgetting import forgetting_patch

OLD, NEW = tiny.batch(seed=1), tiny.batch(seed=2)


def loss_of(model, batch):
    with torch.no_grad():
        return float(model(**tiny.inputs(batch)).loss)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_rows_are_forgotten_by_a_patch_that_reverts_to_the_bit(tmp_path, strength):
    model = tiny.memory_model(mode="add")
    model.model.layers[1].mlp.memory.out.weight.data.normal_()
    untouched = tiny.snapshot(model)
    finetuner, _ = learn(model, [OLD] * 4, protect=3)
    learned = finetuner.detach()
    assert learned.protects
    learned.revert(model)
    before = loss_of(model, OLD)
    forgetting = forgetting_patch(learned, strength)
    forgetting.apply(model)
    assert loss_of(model, OLD) > before
    table = learned.tables[tiny.TABLE]
    written = model.get_parameter("model.memory.0.weight").detach()
    assert torch.equal(written[table.slots], table.originals - strength * (table.rows - table.originals))
    moved = (written != untouched["model.memory.0.weight"]).any(1).nonzero()[:, 0]
    assert torch.isin(moved, table.slots).all()
    assert forgetting.provenance["forgets"] == learned.fingerprint
    assert not forgetting.protects
    forgetting.save(tmp_path)
    assert torch.equal(MemoryPatch.load(tmp_path).tables[tiny.TABLE].rows, forgetting.tables[tiny.TABLE].rows)
    forgetting.revert(model)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())


def test_the_stronger_the_less_likely_the_old_answer_and_new_ones_are_learned_on_top():
    model = tiny.memory_model(mode="add")
    model.model.layers[1].mlp.memory.out.weight.data.normal_()
    learned = learn(model, [OLD] * 4)[0].detach()
    learned.revert(model)
    losses = [loss_of(model, OLD)]
    for strength in (0.5, 1.0, 2.0):
        forgetting = forgetting_patch(learned, strength)
        forgetting.apply(model)
        losses.append(loss_of(model, OLD))
        forgetting.revert(model)
    assert losses == sorted(losses)
    forgetting_patch(learned).apply(model)
    before = loss_of(model, NEW)
    learn(model, [NEW] * 4)[0].detach()
    assert loss_of(model, NEW) < before


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_a_strength_that_forgets_nothing_is_refused(strength):
    with pytest.raises(ValueError, match="must be above 0"):
        forgetting_patch(MemoryPatch({}), strength)

"""RowAdamW: torch's AdamW on dense parameters, Adam on the rows that were read, and nothing on the others."""

import pytest
import torch

from memlayer.layers.optimizer import RowAdamW

NUM_SLOTS, WIDTH = 10, 5


def table(seed=0, dtype=torch.float32):
    values = torch.randn(NUM_SLOTS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(values.to(dtype))


def gradient(slots, seed):
    """A gradient of some rows, as an uncoalesced sparse tensor."""
    values = torch.randn(len(slots), WIDTH, generator=torch.Generator().manual_seed(seed))
    return torch.sparse_coo_tensor(torch.tensor([slots]), values, (NUM_SLOTS, WIDTH))


def step(optimizer, parameter, slots, seed):
    parameter.grad = gradient(slots, seed).to(parameter.dtype)
    optimizer.step()


def test_rows_read_every_step_follow_torch_adam():
    ours, dense = table(), table()
    row_adam = RowAdamW([ours], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
    adam = torch.optim.Adam([dense], lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    for seed in range(20):
        step(row_adam, ours, list(range(NUM_SLOTS)), seed)
        dense.grad = gradient(list(range(NUM_SLOTS)), seed).to_dense()
        adam.step()
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, table(), atol=0.05)


def test_a_row_counts_its_own_steps():
    ours, alone = table(), table()
    often, once = (RowAdamW([p], lr=0.01, weight_decay=0.0) for p in (ours, alone))
    for seed in range(5):
        step(often, ours, [1, 2], seed)
    step(often, ours, [8], seed=9)
    step(once, alone, [8], seed=9)
    assert torch.equal(ours[8], alone[8])
    assert often.state[ours]["step"].tolist() == [0, 5, 5, 0, 0, 0, 0, 0, 1, 0]


def test_a_slot_named_twice_in_a_gradient_takes_one_step_of_the_sum():
    ours, summed = table(), table()
    step(RowAdamW([ours], lr=0.01, weight_decay=0.0), ours, [4, 4, 6], seed=0)
    summed.grad = gradient([4, 4, 6], seed=0).coalesce()
    RowAdamW([summed], lr=0.01, weight_decay=0.0).step()
    assert torch.equal(ours, summed)


def test_rows_that_were_not_read_keep_their_values_and_moments():
    ours = table()
    optimizer = RowAdamW([ours], lr=0.01, weight_decay=0.0)
    step(optimizer, ours, [1, 2, 7], seed=0)
    before = ours.detach().clone()
    state = {key: tensor.clone() for key, tensor in optimizer.state[ours].items()}
    for seed in range(1, 20):
        step(optimizer, ours, [0, 2, 9], seed)
    unread = [1, 3, 4, 5, 6, 7, 8]
    assert torch.equal(ours[unread], before[unread])
    assert all(torch.equal(optimizer.state[ours][key][unread], state[key][unread]) for key in state)
    assert (ours[[0, 2, 9]] != before[[0, 2, 9]]).all()


def test_a_step_leaves_the_gradient_in_place():
    ours = table()
    step(RowAdamW([ours], lr=0.01, weight_decay=0.0), ours, [1, 2], seed=0)
    assert torch.equal(ours.grad.to_dense(), gradient([1, 2], seed=0).to_dense())


def linear(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(WIDTH, 3)


def test_dense_parameters_step_as_in_torchs_fused_adamw_to_the_bit():
    ours, theirs, values = linear(), linear(), table()
    settings = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    row_adam = RowAdamW([{"params": ours.parameters()}, {"params": [values], "weight_decay": 0.0}], **settings)
    adam = torch.optim.AdamW(theirs.parameters(), **settings, fused=True)
    for seed in range(10):
        hidden = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
        for module, optimizer in ((ours, row_adam), (theirs, adam)):
            optimizer.zero_grad()
            module(hidden).pow(2).sum().backward()
            values.grad = gradient([1, 4], seed)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("setting", [{"weight_decay": 0.1}, {"weight_decay": 0.0, "amsgrad": True}])
def test_what_would_move_unread_rows_is_refused_before_anything_moves(setting):
    values, module = table(), linear()
    optimizer = RowAdamW([{"params": module.parameters()}, {"params": [values]}], lr=0.01, **setting)
    before = [p.detach().clone() for p in (values, *module.parameters())]
    module(torch.ones(2, WIDTH)).sum().backward()
    with pytest.raises(ValueError, match="a sparse gradient takes no weight_decay"):
        step(optimizer, values, [1, 2], seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, (values, *module.parameters()), strict=True))


def test_a_closure_is_called_and_its_loss_returned():
    module = linear()
    optimizer = RowAdamW(module.parameters(), lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = module(torch.ones(2, WIDTH)).pow(2).sum()
        loss.backward()
        return loss

    before = module.weight.detach().clone()
    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert not torch.equal(module.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_to_the_bit(tmp_path, dtype):
    ours = table(dtype=dtype)
    optimizer = RowAdamW([ours], lr=0.01, weight_decay=0.0)
    for seed in range(300):  # more steps than bfloat16 can count
        step(optimizer, ours, [1, 2, 7], seed)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = torch.nn.Parameter(ours.detach().clone())
    other = RowAdamW([resumed], lr=0.01, weight_decay=0.0)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    for seed in range(300, 303):
        step(optimizer, ours, [2, 3], seed)
        step(other, resumed, [2, 3], seed)
    assert torch.equal(ours, resumed)
    for key, tensor in optimizer.state[ours].items():
        assert tensor.dtype == other.state[resumed][key].dtype
        assert torch.equal(tensor, other.state[resumed][key]), key


def test_dense_parameters_take_the_step_of_torch_adamw():
    ours, theirs = table(), table()
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    row_adam, adam = RowAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings, foreach=False)
    for seed in range(20):
        ours.grad = theirs.grad = gradient(list(range(NUM_SLOTS)), seed).to_dense()
        row_adam.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_gradient_scaler_unscales_the_gradients_of_rows_as_well():
    ours, scaled = table(), table()
    step(RowAdamW([ours], lr=0.01, weight_decay=0.0, eps=1.0), ours, [4, 6], seed=0)
    optimizer, scaler = RowAdamW([scaled], lr=0.01, weight_decay=0.0, eps=1.0), torch.amp.GradScaler("cpu")
    loss = scaler.scale(torch.zeros(()))  # so that the scaler knows its device
    scaled.grad = gradient([4, 6], seed=0) * scaler.get_scale()
    assert loss == 0
    scaler.step(optimizer)
    assert torch.equal(ours, scaled)

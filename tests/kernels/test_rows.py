"""Row optimizers step the rows they are given as torch's optimizers would, and touch nothing else."""

import pytest
import torch

from memlayer_kernels import ops, rows

NUM_SLOTS, WIDTH = 50, 7
ADAM = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def state(dtype=torch.float32):
    return (
        torch.zeros(NUM_SLOTS, WIDTH, dtype=dtype),
        torch.zeros(NUM_SLOTS, WIDTH, dtype=dtype),
        torch.zeros(NUM_SLOTS),
    )


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_ROWS", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_on_all_rows_equals_torch(dtype):
    values = torch.randn(NUM_SLOTS, WIDTH, dtype=dtype)
    parameter = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.01)
    moments = state(dtype)
    for _ in range(5):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        rows.adam_rows_(values, torch.arange(NUM_SLOTS), parameter.grad, *moments, **ADAM)
        torch.testing.assert_close(values, parameter.data, rtol=1e-5, atol=1e-6)


def test_a_slot_stepped_now_and_then_moves_as_if_the_other_steps_had_not_been():
    values = torch.randn(NUM_SLOTS, WIDTH)
    parameter = torch.nn.Parameter(values[[3]].clone())
    optimizer = torch.optim.Adam([parameter], lr=0.01)
    moments = state()
    for step in range(6):
        slots = torch.tensor([3, 20]) if step % 2 else torch.tensor([20, 30])
        grad = torch.randn(2, WIDTH)
        rows.adam_rows_(values, slots, grad, *moments, **ADAM)
        if step % 2:
            parameter.grad = grad[:1].clone()
            optimizer.step()
    torch.testing.assert_close(values[[3]], parameter.data)
    assert moments[2][[3, 20, 30]].tolist() == [3, 6, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["adam", "sgd"])
def test_rows_that_are_not_named_do_not_move_and_neither_does_their_state(method, dtype):
    values = torch.randn(NUM_SLOTS, WIDTH).to(dtype)
    moments = tuple(m.fill_(0.5) for m in state())
    before = [t.clone() for t in (values, *moments)]
    slots = torch.arange(1, NUM_SLOTS, 3)
    grad = torch.randn(len(slots), WIDTH).to(dtype)
    if method == "adam":
        rows.adam_rows_(values, slots, grad, *moments, **ADAM | {"lr": 1.0})
    else:
        rows.sgd_rows_(values, slots, grad, lr=1.0)
    others = torch.ones(NUM_SLOTS, dtype=torch.bool)
    others[slots] = False
    for now, then in zip((values, *moments), before):
        assert torch.equal(now[others], then[others])
    assert (values[slots] != before[0][slots]).any(dim=1).all()


def test_sgd_equals_torch():
    values = torch.randn(NUM_SLOTS, WIDTH)
    slots = torch.tensor([0, 4, 49])
    grad = torch.randn(3, WIDTH)
    parameter = torch.nn.Parameter(values[slots].clone())
    parameter.grad = grad
    torch.optim.SGD([parameter], lr=0.3).step()
    rows.sgd_rows_(values, slots, grad, lr=0.3)
    assert torch.equal(values[slots], parameter.data)


def test_no_rows_is_a_step_that_changes_nothing():
    values = torch.randn(NUM_SLOTS, WIDTH)
    before = values.clone()
    rows.adam_rows_(values, torch.zeros(0, dtype=torch.int64), torch.zeros(0, WIDTH), *state(), **ADAM)
    assert torch.equal(values, before)


def test_parameters_are_stepped_in_place():
    values = torch.nn.Parameter(torch.randn(NUM_SLOTS, WIDTH))
    before = values.detach().clone()
    rows.sgd_rows_(values, torch.tensor([1]), torch.ones(1, WIDTH), lr=1.0)
    assert torch.equal(values[1], before[1] - 1)


@pytest.mark.parametrize("num_backwards", [1, 2])
def test_sparse_rows_reads_grad_after_one_or_several_backwards(num_backwards):
    values = torch.randn(NUM_SLOTS, WIDTH, requires_grad=True)
    slots = torch.randint(NUM_SLOTS, (num_backwards, 9, 4))
    weights = torch.randn(9, 4)
    for i in range(num_backwards):
        ops.memory_lookup(values, slots[i], weights, sparse_grad=True).sum().backward()
    used, grad = rows.sparse_rows(values.grad)
    assert torch.equal(used, slots.unique())
    torch.testing.assert_close(grad, values.grad.to_dense()[used])


def test_sparse_rows_copies_only_what_is_out_of_order():
    ordered = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, WIDTH), (NUM_SLOTS, WIDTH))
    assert rows.sparse_rows(ordered)[1].data_ptr() == ordered._values().data_ptr()
    repeated = torch.sparse_coo_tensor([[3, 1, 3]], torch.ones(3, WIDTH), (NUM_SLOTS, WIDTH))
    slots, grad = rows.sparse_rows(repeated)
    assert slots.tolist() == [1, 3]
    assert grad[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("slots", "num_rows", "message"),
    [
        ([3, 3], 2, "the 2 slots are not strictly ascending"),
        ([4, 50], 2, "slots range from 4 to 50, values has slots 0 to 49"),
        ([-1, 5], 2, "slots range from -1 to 5"),
        ([1, 2], 3, r"gradient has shape \(3, 7\), expected \(2, 7\)"),
    ],
)
def test_refuses(slots, num_rows, message):
    with pytest.raises(ValueError, match=message):
        rows.sgd_rows_(
            torch.zeros(NUM_SLOTS, WIDTH), torch.tensor(slots), torch.zeros(num_rows, WIDTH), lr=1.0
        )


def test_refuses_state_that_does_not_fit_and_dense_gradients():
    values, slots, grad = torch.zeros(NUM_SLOTS, WIDTH), torch.tensor([1]), torch.zeros(1, WIDTH)
    with pytest.raises(ValueError, match=r"optimizer state has dtype torch.bfloat16, expected torch.float32"):
        rows.adam_rows_(values, slots, grad, *state(torch.bfloat16), **ADAM)
    with pytest.raises(ValueError, match=r"optimizer state has shape \(49,\), values has \(50, 7\)"):
        rows.adam_rows_(values, slots, grad, *state()[:2], torch.zeros(49), **ADAM)
    with pytest.raises(ValueError, match=r"gradient has layout torch.strided, expected sparse COO"):
        rows.sparse_rows(values)

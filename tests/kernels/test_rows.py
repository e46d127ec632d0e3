"""Row optimizers step the rows they are given as torch's would, in torch and Triton, and touch nothing else."""

import pytest
import torch

from memlayer_kernels import ops, rows, rows_cpu, rows_gpu

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
    monkeypatch.setattr(rows_cpu, "BLOCK_ROWS", 8)


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
        rows.sgd_rows_(torch.zeros(NUM_SLOTS, WIDTH), torch.tensor(slots), torch.zeros(num_rows, WIDTH), lr=1.0)


def test_refuses_state_that_does_not_fit_and_dense_gradients():
    values, slots, grad = torch.zeros(NUM_SLOTS, WIDTH), torch.tensor([1]), torch.zeros(1, WIDTH)
    with pytest.raises(ValueError, match=r"optimizer state exp_avg has dtype torch.bfloat16, expected torch.float32"):
        rows.adam_rows_(values, slots, grad, *state(torch.bfloat16), **ADAM)
    with pytest.raises(ValueError, match=r"optimizer state steps has shape \(49,\), expected \(50,\)"):
        rows.adam_rows_(values, slots, grad, *state()[:2], torch.zeros(49), **ADAM)
    with pytest.raises(ValueError, match=r"gradient has layout torch.strided, expected sparse COO"):
        rows.sparse_rows(values)
    with pytest.raises(ValueError, match=r"rounding_seed is 1 for values in torch.float32, expected bfloat16"):
        rows.sgd_rows_(values, slots, grad, 1.0, rounding_seed=1)
    with pytest.raises(ValueError, match=r"values has strides \(1, 50\), expected to be contiguous"):
        rows.sgd_rows_(torch.zeros(WIDTH, NUM_SLOTS).t(), slots, grad, 1.0)
    with pytest.raises(ValueError, match=r"gradient is on meta, values is on cpu"):
        rows.sgd_rows_(values, slots, grad.to("meta"), 1.0)


def test_decay_of_all_rows_equals_torch_adamw():
    values = torch.randn(NUM_SLOTS, WIDTH)
    parameter = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.3)
    moments = state()
    for _ in range(5):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        rows.adam_rows_(values, torch.arange(NUM_SLOTS), parameter.grad, *moments, **ADAM, weight_decay=0.3)
        torch.testing.assert_close(values, parameter.data, rtol=1e-5, atol=1e-6)


# One rounding to the dtype, the other way where the sums before it differ in their last bit.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
}


@pytest.mark.parametrize("dtype", [*TOLERANCE])
@pytest.mark.parametrize("width", [1, 21, 1030])
@pytest.mark.parametrize("method", ["adam", "sgd"])
def test_triton_steps_as_torch_does_and_twice_the_same(device, method, width, dtype):
    random = torch.Generator().manual_seed(width)
    start = torch.randn(9, width, generator=random).to(dtype)
    moments = torch.randn(9, width, generator=random), torch.rand(9, width, generator=random), torch.arange(9.0) ** 4
    slots, grad = torch.tensor([0, 3, 8]), torch.randn(3, width, generator=random).to(dtype)

    def step(backend, where):
        values = start.to(where, copy=True)
        if method == "sgd":
            backend.sgd_rows_(values, slots.to(where), grad.to(where), 0.1, None)
            return [values.cpu()]
        tensors = [values, *(m.to(where, copy=True) for m in moments)]
        steps = tensors[3][slots.to(where)] + 1
        backend.adam_rows_(
            values, slots.to(where), grad.to(where), *tensors[1:3], steps, 0.1, 0.9, 0.999, 1e-8, 0.2, None
        )
        return [tensor.cpu() for tensor in tensors[:3]]

    expected, found = step(rows_cpu, "cpu"), step(rows_gpu, device)
    for tensor, right in zip(found, expected):
        torch.testing.assert_close(tensor, right, **TOLERANCE[right.dtype])
    assert not torch.equal(found[0][slots], start[slots])
    assert all(torch.equal(a[[1, 2, 4, 5, 6, 7]], b[[1, 2, 4, 5, 6, 7]]) for a, b in zip(found, [start, *moments]))
    assert all(torch.equal(a, b) for a, b in zip(found, step(rows_gpu, device)))


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 1])
def test_stochastic_rounding_gives_the_same_bits_in_torch_and_triton(device, seed):
    """Of steps that both take exactly: by gradients of few bits and a rate that is a power of two."""
    values = torch.randn(70, 33).bfloat16()
    slots, grad = torch.arange(1, 70, 3), torch.randint(-999, 999, (23, 33)) / 2**16
    found = values.to(device, copy=True)
    rows_gpu.sgd_rows_(found, slots.to(device), grad.to(device), 0.125, seed)
    rows_cpu.sgd_rows_(values, slots, grad, 0.125, seed)
    assert torch.equal(found.cpu(), values)


def test_stochastic_rounding_keeps_the_mean_of_small_steps():
    """A step of an eighth of the distance to the next bfloat16 is taken by one number in eight."""
    values = torch.ones(200, 500, dtype=torch.bfloat16)
    grad = torch.full((200, 500), -1.0)
    rows.sgd_rows_(values, torch.arange(200), grad, 2.0**-10)
    assert (values == 1).all()
    rows.sgd_rows_(values, torch.arange(200), grad, 2.0**-10, rounding_seed=3)
    moved = (values == 1 + 2**-7).float()
    assert ((values == 1) | moved.bool()).all()
    # 100,000 draws: the standard deviation of the share is 0.001; of a row's share 0.015, of a column's 0.023
    assert abs(moved.mean() - 0.125) < 0.005
    assert (moved.mean(1) - 0.125).abs().max() < 0.075
    assert (moved.mean(0) - 0.125).abs().max() < 0.12


def test_stochastic_rounding_depends_on_the_seed_alone_and_spares_what_needs_none():
    start = torch.randn(NUM_SLOTS, WIDTH).bfloat16()
    start[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    slots = torch.arange(NUM_SLOTS)

    def step(seed, lr=1e-3):
        values = start.clone()
        rows.sgd_rows_(values, slots, torch.ones(NUM_SLOTS, WIDTH), lr, rounding_seed=seed)
        return values

    assert torch.equal(step(1)[1:], step(1)[1:])
    assert not torch.equal(step(1)[1:], step(2)[1:])
    torch.testing.assert_close(step(1, lr=0.0), start, rtol=0, atol=0, equal_nan=True)


def test_stochastic_rounding_keeps_a_nan_whatever_its_bits(device):
    """The bits of a NaN may all be ones, to which nothing can be added."""
    grad = torch.full((1, 64), -1, dtype=torch.int32).view(torch.float32)
    assert grad.isnan().all()
    for backend, where in ((rows_cpu, "cpu"), (rows_gpu, device)):
        values = torch.ones(2, 64, dtype=torch.bfloat16, device=where)
        backend.sgd_rows_(values, torch.tensor([1], device=where), grad.to(where), 1.0, 5)
        assert values[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_rows_are_put_in_place_with_their_bits_at_any_width_and_address(dtype, width, offset):
    bits = torch.randint(0, 256, (10 * 8 * 8 + 64,), dtype=torch.uint8)
    table = bits.view(dtype)[offset : offset + 10 * width].view(10, width)
    rows = torch.randint(0, 256, (3 * width * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(3, width)
    slots = torch.tensor([1, 4, 9])
    before, expected = bits.clone(), bits.clone()
    start = offset * dtype.itemsize
    row_bytes = width * dtype.itemsize
    for slot, row in zip(slots.tolist(), rows.view(torch.uint8).view(3, row_bytes)):
        expected[start + slot * row_bytes : start + (slot + 1) * row_bytes] = row
    rows_cpu._put(table, slots, rows)
    assert torch.equal(bits, expected)
    assert not torch.equal(bits, before)

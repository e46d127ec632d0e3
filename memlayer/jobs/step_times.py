"""How long a training step of several models takes, measured side by side in one process.

A step is what costs time in every one: forward, backward, clipping, the optimizer. The models take turns on the same
batch, so that whatever else the machine does hits all alike, and the median of each is told. Left out: reading text,
which all do alike.
"""

import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from memlayer.jobs.text_trainer import TextTrainer

WARM_UP = 2  # steps of each model before the first that counts: the optimizer makes its state in them


def step_seconds(trainers: Mapping[str, TextTrainer], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Median seconds of a training step of each model; the models are other ones afterwards.

    Args:
        trainers: each with the model on its device, and not yet trained.
        batches: one for each round after ``WARM_UP``, which take the first ones again.

    Raises:
        ValueError: there is no batch.
    """
    if not batches:
        raise ValueError("no batch to time steps on")
    optimizers = {name: trainer.create_optimizer() for name, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(WARM_UP + len(batches)):
        batch = batches[max(0, number - WARM_UP)]
        for name, trainer in trainers.items():
            took = _step(trainer, optimizers[name], batch)
            if number >= WARM_UP:
                seconds[name].append(took)
    return {name: median(each) for name, each in seconds.items()}


def _step(trainer: TextTrainer, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor]) -> float:
    model, told = trainer.model.train(), trainer.args
    device = told.device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    dtype = torch.float16 if told.fp16 else torch.bfloat16
    _wait(device)
    start = time.perf_counter()
    with torch.autocast(device.type, dtype, enabled=told.bf16 or told.fp16):
        loss = model(**inputs).loss
    loss.backward()
    nn.utils.clip_grad_norm_(
        [p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse], told.max_grad_norm
    )
    optimizer.step()
    optimizer.zero_grad()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

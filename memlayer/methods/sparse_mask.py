"""Finetune a fixed set of single numbers of the weights, chosen before training: which, decides the method.

    random       SHiRA's random mask (arXiv:2406.13175): the control, which knows nothing of what is taught
    magnitude    the largest numbers, as SHiRA's weight-magnitude mask
    fisher       where the loss of what is taught has large gradients: FISH Mask (arXiv:2111.09839), and Child-Tuning-D
                 (arXiv:2109.05687) without its scaling
    infonce      where the loss has that pulls a lesson's wordings together: the choice of MIST (arXiv:2505.19943)

All four are after their papers. Ours is: the share is of each tensor and exact, nothing with a score of 0 is chosen, a
gradient is squared for a lesson's batch and not for an example, numbers are written into the weights where PEFT keeps
SHiRA's beside them, and optimizer and dropout are those of ``sparse_optimizer``.

Scoring by a gradient needs a float32 number for each number that may be chosen, once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from memlayer.data.qa import MASKS
from memlayer.layers.product_keys import ProductKeys
from memlayer.methods.infonce import lesson_losses, projection
from memlayer.methods.prepared import Prepared
from memlayer.methods.sparse_optimizer import SparseOptimizer

SCORES = ("random", "magnitude", "fisher", "infonce")


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of a model's linear layers, by name: what numbers are chosen from.

    Kinds of modules decide and not names. Left out are what an embedding or the output head holds, tied or not, and the
    queries of product keys: they decide what every row of a memory means.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) or m is head}
    left_out |= {id(m.query.weight) for m in model.modules() if isinstance(m, ProductKeys)}
    eligible = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)} - left_out
    return {name: p for name, p in model.named_parameters() if id(p) in eligible}


def top_share(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """The numbers of each tensor with the highest scores: a share of them, and never one whose score is 0.

    Args:
        scores: per tensor, at least 0, of any shape.
        density: share of each tensor, above 0 and at most 1; rounded to whole numbers.

    Returns:
        per tensor, int32 places in the flattened tensor, ascending; none where no score is above 0.

    Raises:
        ValueError: a score is negative or nan, or ``density`` out of range.
    """
    _check_density(density)
    chosen = {}
    for name, score in scores.items():
        flat = score.detach().flatten()
        if not bool((flat >= 0).all()):
            raise ValueError(f"scores of {name} are negative or nan: numbers are ranked by scores of at least 0")
        count = min(round(density * flat.numel()), int(flat.count_nonzero()))
        chosen[name] = flat.topk(count, sorted=False).indices.int().sort().values
    return chosen


def random_share(parameters: Mapping[str, Tensor], density: float, seed: int) -> dict[str, Tensor]:
    """A share of each tensor's numbers, each as likely as any other; see ``top_share``. Drawn on the CPU."""
    _check_density(density)
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for name, parameter in parameters.items():
        order = torch.randperm(parameter.numel(), generator=generator)
        index_C = order[: round(density * parameter.numel())].int().sort().values
        chosen[name] = index_C.to(parameter.device)
    return chosen


def squared_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], losses: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Mean over losses of the squared gradient of each number: the diagonal of the empirical Fisher, batch by batch.

    One tensor's gradient exists at a time, beside the sums. The model is left as it was.

    Args:
        model: every other parameter of it is frozen meanwhile.
        parameters: those to score.
        losses: scalars, best made one by one by a generator, each for one batch.

    Returns:
        per parameter, float32 of its shape.

    Raises:
        ValueError: there is no loss, or one is no finite number.
    """
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}

    def add(name: str, parameter: nn.Parameter) -> None:
        sums[name].add_(parameter.grad.float().square_())
        parameter.grad = None

    number = 0
    with _training_only(model, parameters):
        handles = [p.register_post_accumulate_grad_hook(partial(add, name)) for name, p in parameters.items()]
        try:
            for loss in losses:
                if not bool(torch.isfinite(loss)):
                    raise ValueError(f"the loss of batch {number} is {loss.item()}: no gradient can be scored")
                loss.backward()
                number += 1
        finally:
            for handle in handles:
                handle.remove()
    if not number:
        raise ValueError("there is no batch to score the numbers of the model on")
    return {name: total.div_(number) for name, total in sums.items()}


@contextmanager
def _training_only(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Only these parameters get gradients; which did before do so again afterwards, with the gradients they had."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.requires_grad_(False)
    for p in parameters.values():
        p.grad = None
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad


def choose(
    model: nn.Module,
    score: str,
    density: float,
    seed: int,
    lessons: Sequence[Mapping[str, Tensor]] = (),
) -> dict[str, Tensor]:
    """The numbers of ``linear_weights`` to move, by one of SCORES.

    Args:
        lessons: a batch each, for the scores that look at what is taught.

    Raises:
        ValueError: an unknown score or a density out of range, or there is nothing to choose from or by.
    """
    parameters = linear_weights(model)
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no linear layer whose numbers could be chosen")
    if score == "random":
        return random_share(parameters, density, seed)
    if score == "magnitude":
        return top_share({name: p.detach().abs() for name, p in parameters.items()}, density)
    if score == "fisher":
        return top_share(squared_gradients(model, parameters, (answer_loss(model, each) for each in lessons)), density)
    if score == "infonce":
        head = projection(model.config.get_text_config().hidden_size, seed, model.device).requires_grad_(False)
        return top_share(squared_gradients(model, parameters, lesson_losses(model, head, lessons)), density)
    raise ValueError(f"score is {score!r}, must be one of {', '.join(SCORES)}")


def answer_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss on a batch."""
    return model(**{key: value for key, value in batch.items() if key not in MASKS}).loss


def prepare(model: nn.Module, background, settings, lessons: Sequence[Mapping[str, Tensor]]) -> Prepared:
    """Move the chosen numbers. ``background`` is not used."""
    mask_seed, drop_seed = torch.randint(2**62, (2,)).tolist()  # of the run's own seed
    indices = choose(model, settings.score, settings.density, mask_seed, lessons)
    optimizer = SparseOptimizer(
        model,
        indices,
        settings.learning_rate,
        rule=settings.optimizer,
        momentum=settings.momentum,
        drop=settings.drop,
        seed=drop_seed,
    )

    def finish() -> None:
        optimizer.detach()

    return Prepared(model, optimizer, finish)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, must be above 0 and at most 1")

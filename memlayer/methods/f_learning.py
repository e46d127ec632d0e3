"""F-Learning: forget the old answer before learning the new one, for facts that have changed.

A model is finetuned on what it knows already, and that change is subtracted, times a strength, from the weights it
started with; then the new facts are taught. It is no method for new facts: of those there is nothing to forget.

    delta = train(theta, old) - theta      theta' = theta - strength * delta      theta* = train(theta', new)

Source: Ni et al., arXiv:2311.08011. The paper's: the three steps, each training full or by LoRA, in any combination.
Its values of the strength are not public text that we have seen: choose one by other lessons (``best_strength``). The
slot-sparse form is in patch/forgetting.py.
"""

from collections.abc import Callable, Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, by its name; one that has two names once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def restore(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write a snapshot back, to the bit."""
    for name, parameter in _checked(model, weights).items():
        parameter.copy_(weights[name])


@torch.no_grad()
def delta_since(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By how much each parameter that has moved since a snapshot has, in float32 at least.

    Raises:
        ValueError: the snapshot is of another model.
    """
    parameters = _checked(model, before)
    moved = {name: parameter for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    return {name: _wide(parameter.detach()) - _wide(before[name]) for name, parameter in moved.items()}


def lora_delta(wrapped: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """The change that a LoRA adapter makes, B A * alpha / r, by the names of the weights that it is added to.

    The adapter has to be taken off (``wrapped.unload()``) before the change is applied to its model.
    """
    found = {}
    for name, module in wrapped.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            found[f"{name}.weight"] = module.get_delta_weight(adapter).detach()
    if not found:
        raise ValueError(f"the model has no LoRA layers of adapter {adapter!r}")
    return found


@torch.no_grad()
def add_delta(model: nn.Module, delta: Mapping[str, Tensor], scale: float) -> None:
    """Add ``scale`` times a change to the parameters that it names; minus the strength forgets.

    Raises:
        ValueError: the model lacks a parameter, or it has another shape; nothing is changed then.
    """
    for name, parameter in _checked(model, delta).items():
        parameter.copy_(_wide(parameter) + scale * delta[name])


def forget_then_learn(
    model: nn.Module,
    train_old: Callable[[nn.Module], object],
    train_new: Callable[[nn.Module], object],
    strength: float,
) -> dict[str, Tensor]:
    """Finetune on what is to be forgotten, subtract that from what was, and learn what is new.

    Args:
        model: changed in place; an ordinary one again whenever a training function returns.
        train_old: finetunes the model it is given, in place, on the old answers.
        train_new: the same on the new ones; with its own optimizer.
        strength: of forgetting; 0 is plain finetuning on the new answers, to the bit.

    Returns:
        the change that was subtracted, before the strength.

    Raises:
        ValueError: the strength is below 0.
    """
    if strength < 0:
        raise ValueError(f"strength is {strength}, must be at least 0: less would teach the old answers")
    before = snapshot(model)
    train_old(model)
    delta = delta_since(model, before)
    restore(model, before)
    if strength:
        add_delta(model, delta, -strength)
    train_new(model)
    return delta


def best_strength(tried: Mapping[float, tuple[float, float]], kept_before: float, max_drop: float = 0.02) -> float:
    """The strength with which most was learned, of those that lost little else; of equal ones the least.

    Args:
        tried: per strength what was learned of the new answers, and what was kept of other questions, of lessons that
            nothing is reported on.
        kept_before: what the untouched model knows of the other questions.
        max_drop: how much of that may be lost.

    Raises:
        ValueError: every strength lost more; it says how much the best of them did.
    """
    kept = {strength: learned for strength, (learned, kept) in tried.items() if kept >= kept_before - max_drop}
    if not kept:
        most = max((kept for _, kept in tried.values()), default=float("nan"))
        raise ValueError(f"of {len(tried)} strengths none keeps {kept_before - max_drop:g}, the best keeps {most:g}")
    return max(sorted(kept), key=kept.__getitem__)


def _checked(model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters())
    for name, tensor in named.items():
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name!r}")
        if parameters[name].shape != tensor.shape:
            ours, theirs = tuple(parameters[name].shape), tuple(tensor.shape)
            raise ValueError(f"parameter {name!r} is {ours} in the model, {theirs} in what is written to it")
    return {name: parameters[name] for name in named}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

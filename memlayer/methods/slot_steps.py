"""Steps of any torch optimizer in which every slot counts as a parameter of its own.

torch keeps one state for a parameter, here one for a slot: the moments of a slot wait until it is selected again,
and Adam's step count is the slot's, or the first step of a slot selected late would be three times too long. Slots
whose step counts agree are stepped together, as one parameter of a copy of the optimizer. An optimizer in which the
step of a row depends on other rows is refused.

Shapes: R rows of a step, V value width, P parts whose rows are stepped together.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memlayer.methods.slot_store import SlotStore

STEPPED, STATE = "stepped", "state."  # columns: whether a slot has state, and the state by its name in torch


def group_of(optimizer: Optimizer, rows: nn.Parameter) -> dict:
    """The parameter group of the rows, with their learning rate.

    Raises:
        ValueError: the optimizer does not step them.
    """
    for group in optimizer.param_groups:
        if any(parameter is rows for parameter in group["params"]):
            return group
    raise ValueError(f"the {type(optimizer).__name__} does not step the rows: make it of finetuner.parameters()")


@torch.no_grad()
def check_optimizer(optimizer: Optimizer, rows: nn.Parameter) -> None:
    """Step three rows together and each alone, to see that it makes no difference.

    Raises:
        ValueError: it does, or state is neither one number nor of the shape of the rows, or the step fails.
    """
    group, name = group_of(optimizer, rows), type(optimizer).__name__
    advice = "use one in which every number steps by itself, such as SGD, Adam or AdamW"
    start_RV = torch.linspace(-1, 1, 3 * rows.shape[1], dtype=rows.dtype, device=rows.device).view(3, -1)
    try:
        together_RV = _try(optimizer, group, start_RV)
        alone_RV = torch.cat([_try(optimizer, group, row_1V) for row_1V in start_RV.split(1)])
    except Exception as error:  # whatever an optimizer of somebody else's raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        told = f"{name} cannot step memory rows, each of which has a state of its own ({reason}): {advice}"
        raise ValueError(told) from error
    if not torch.allclose(together_RV, alone_RV, rtol=1e-3, atol=1e-7):
        raise ValueError(f"{name} cannot step memory rows: the step of one row depends on the others: {advice}")


def _try(optimizer: Optimizer, group: dict, start_RV: Tensor) -> Tensor:
    """The change of rows in two steps."""
    parameter = nn.Parameter(start_RV.clone())
    copy = _copy(optimizer, {**group, "lr": 0.01}, [parameter])
    for factor in (3.0, -7.0):
        parameter.grad = (factor * start_RV).sin()
        type(optimizer).step(copy)
    for key, value in copy.state[parameter].items():
        if value is not None and not _is_number(value) and getattr(value, "shape", None) != parameter.shape:
            raise ValueError(f"its {key} is neither one number nor of the shape of the rows")
    return parameter - start_RV


def _copy(optimizer: Optimizer, group: Mapping, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """The same optimizer for other parameters, without state, hooks or a scheduler's wrapping of its step."""
    copy = object.__new__(type(optimizer))
    copy.__dict__.update(optimizer.__dict__)
    copy.__dict__.pop("step", None)
    copy.state, copy.param_groups = defaultdict(dict), [{**group, "params": list(parameters)}]
    copy._optimizer_step_pre_hooks, copy._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    return copy


def _is_number(value) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)


class SlotSteps:
    """Optimizer state in a store, and steps with it.

    Attributes:
        numbers: of each state that is one number a slot, a value of its type, for making others.
    """

    def __init__(self, store: SlotStore):
        self._store = store
        self.numbers: dict[str, Tensor | int | float] = {}

    def step(self, optimizer: Optimizer, group: Mapping, rows_RV: Tensor, grad_RV: Tensor, at_R: Tensor) -> None:
        """One step of the rows in place, with the state of the slots at these places of the store."""
        parts = self._parts(at_R)
        parameters = [nn.Parameter(rows_RV if i is None else rows_RV[i]) for i in parts]
        copy = _copy(optimizer, group, parameters)
        for i, parameter in zip(parts, parameters, strict=True):
            parameter.grad = grad_RV if i is None else grad_RV[i]
            if state := self._load(at_R if i is None else at_R[i]):
                copy.state[parameter] = state
        type(optimizer).step(copy)
        for i, parameter in zip(parts, parameters, strict=True):
            self._save(copy.state[parameter], at_R if i is None else at_R[i])
            if i is not None:
                rows_RV[i] = parameter.detach()

    def _parts(self, at_R: Tensor) -> list[Tensor | None]:
        """Which rows have the same numbers in their state; [None] where all have."""
        if STEPPED not in self._store:
            return [None]
        part_R = torch.zeros_like(at_R)
        for name in (STEPPED, *(STATE + key for key in self.numbers)):  # unique(dim=0) compares row by row, far slower
            number_R = self._store.get(name, at_R).unique(return_inverse=True)[1]
            part_R = (part_R * len(at_R) + number_R).unique(return_inverse=True)[1]
        sizes = part_R.bincount().tolist()
        return [None] if len(sizes) <= 1 else list(part_R.argsort(stable=True).split(sizes))

    def _load(self, at_R: Tensor) -> dict:
        """The state of slots that share their numbers; empty where they were never stepped."""
        if STEPPED not in self._store or not self._store.get(STEPPED, at_R[:1]).any():
            return {}
        state = {}
        for name in self._store:
            if name.startswith(STATE):
                key = name.removeprefix(STATE)
                example = self.numbers.get(key)
                entries = self._store.get(name, at_R if example is None else at_R[:1])
                state[key] = entries if example is None else _like(example, entries.item())
        return state

    def _save(self, state: Mapping, at_R: Tensor) -> None:
        kept = {key: value for key, value in state.items() if value is not None}
        for key, value in kept.items():
            if _is_number(value):
                self.numbers[key] = value.clone() if isinstance(value, Tensor) else value
                value = torch.full(at_R.shape, float(value), dtype=torch.float64, device=at_R.device)
            self._store.put(STATE + key, at_R, value)
        if kept:
            self._store.put(STEPPED, at_R, torch.ones_like(at_R, dtype=torch.bool))


def _like(example: Tensor | int | float, number: float) -> Tensor | int | float:
    return torch.full_like(example, number) if isinstance(example, Tensor) else type(example)(number)

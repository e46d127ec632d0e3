"""An optimizer that moves a fixed choice of single numbers and keeps state for these alone.

The optimizer's own parameters are the chosen numbers in float32, one flat tensor for each weight. When a backward pass
has made a weight's gradient, a hook adds the chosen part to ``.grad`` of the flat tensor and frees the rest, so the
gradient of one weight at a time exists, micro-batches add up, and clipping sees what will move. ``step`` writes the new
numbers into the weights. What was not chosen is never touched.

Per chosen number it costs 4 bytes of index, 4 of the number, 4 (SGD with momentum) or 8 (Adam) of state, and its
original, beside the gradient; of a model in bfloat16 steps smaller than its spacing add up in the float32 numbers.
Left out: several processes, whose reducers own the gradients.

Shapes: C chosen numbers of one weight, S of them in one step.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from memlayer.decoders.fingerprint import bits
from memlayer.methods.delta import SparseDelta


class SparseOptimizer(Optimizer):
    """SGD, Adam or AdamW of chosen numbers, with gradient dropout under which a dropped number does not move.

    In any training loop::

        optimizer = SparseOptimizer(model, indices, lr=1e-4, drop=0.9)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
        delta = optimizer.detach()

    ``step`` takes the gradients, so that the next backward pass begins anew; ``zero_grad`` drops them instead. Every
    other parameter of the model is frozen until ``detach``.

    Args:
        model: the model whose parameters are chosen from.
        indices: per parameter name, int32 places in the flattened parameter, ascending.
        lr: learning rate.
        rule: "sgd", "adam" (decay added to the gradient) or "adamw" (decay apart from it), as in torch.
        momentum: of SGD, without dampening.
        betas, eps: of Adam.
        weight_decay: of the chosen numbers.
        drop: share of the chosen numbers that each step leaves out, each drawn by itself and drawn anew each step. They
            keep value, moments and step count. What is kept is not scaled up, as in MIST (arXiv:2505.19943).
        seed: of these draws, which are made on the CPU, so they are the same on every device.

    Raises:
        ValueError: a number is out of range, a parameter is not there, not contiguous or too large for int32, nothing
            is chosen, or several processes train.
    """

    def __init__(
        self,
        model: nn.Module,
        indices: Mapping[str, Tensor],
        lr: float,
        rule: str = "sgd",
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        drop: float = 0.0,
        seed: int = 0,
    ):
        _check_settings(lr, rule, momentum, betas, eps, weight_decay, drop)
        parameters = dict(model.named_parameters())
        indices = {name: index_C for name, index_C in indices.items() if len(index_C)}
        if not indices:
            raise ValueError("no number is chosen, so nothing would be learned")
        for name, index_C in indices.items():
            _check_indices(name, parameters.get(name), index_C)
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ValueError(f"{distributed.get_world_size()} processes train: single numbers are moved by one process")
        self._weights = {name: parameters[name] for name in indices}
        self._indices = {name: index_C.to(parameters[name].device) for name, index_C in indices.items()}
        self._originals = {name: self._chosen(name) for name in self._indices}
        numbers = [
            nn.Parameter(start_C.to(torch.promote_types(start_C.dtype, torch.float32), copy=True))
            for start_C in self._originals.values()
        ]
        defaults = {"lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(numbers, defaults | {"rule": rule, "drop": drop})
        self._numbers = dict(zip(self._indices, numbers, strict=True))
        self._generator = torch.Generator().manual_seed(seed)
        self._trainable = [p for p in parameters.values() if p.requires_grad]
        model.requires_grad_(False)
        self._listening = []
        for name, weight in self._weights.items():
            weight.requires_grad_(True)
            self._listening.append(weight.register_post_accumulate_grad_hook(partial(self._gather, name)))

    @property
    def indices(self) -> dict[str, Tensor]:
        """The places chosen, int32 and ascending, by parameter name."""
        return dict(self._indices)

    @property
    def num_chosen(self) -> int:
        """How many numbers may move."""
        return sum(map(len, self._indices.values()))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Move the chosen numbers by their gradients, less those dropped, and write them into the weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        for name, numbers_C in self._numbers.items():
            if numbers_C.grad is not None:
                self._take_over(name, numbers_C)
                self._step(name, numbers_C, group)
                numbers_C.grad = None
        self.write()
        return loss

    def _take_over(self, name: str, numbers_C: nn.Parameter) -> None:
        """Go on from what somebody else has put into the weights since the last step, as a trust region does."""
        found_C = self._chosen(name)
        moved_C = bits(found_C) != bits(numbers_C.to(found_C.dtype))
        numbers_C[moved_C] = found_C[moved_C].to(numbers_C.dtype)

    def _step(self, name: str, numbers_C: nn.Parameter, group: dict) -> None:
        state = self.state[numbers_C]
        if not state:
            state |= _new_state(numbers_C, group)
        rule = _sgd if group["rule"] == "sgd" else _adam
        if not group["drop"]:
            return rule(numbers_C, numbers_C.grad, state, group)
        kept_S = (torch.rand(len(numbers_C), generator=self._generator) >= group["drop"]).nonzero()[:, 0]
        kept_S = kept_S.to(numbers_C.device)
        numbers_S, state_S = numbers_C[kept_S], {key: column[kept_S] for key, column in state.items()}
        rule(numbers_S, numbers_C.grad[kept_S], state_S, group)
        numbers_C[kept_S] = numbers_S
        for key, column_S in state_S.items():
            state[key][kept_S] = column_S

    @torch.no_grad()
    def write(self) -> None:
        """Put the numbers into the weights: ``step`` does so, and who moves the numbers themselves calls it."""
        for name, numbers_C in self._numbers.items():
            self._weights[name].view(-1)[self._indices[name]] = numbers_C.to(self._weights[name].dtype)

    def delta(self) -> SparseDelta:
        """What has changed so far."""
        return SparseDelta.between(self._weights, self._indices, self._originals)

    def detach(self) -> SparseDelta:
        """Give the model back as an ordinary one and return what was changed; the optimizer steps no more."""
        delta = self.delta()
        for handle in self._listening:
            handle.remove()
        for weight in self._weights.values():
            weight.requires_grad_(False)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        return delta

    def state_dict(self) -> dict:
        """torch's, with the chosen numbers, where they are, what stood there, and where the draws of ``drop`` are."""
        with torch.no_grad():
            for name, numbers_C in self._numbers.items():
                self._take_over(name, numbers_C)
        ours = {
            "names": list(self._indices),
            "indices": list(self._indices.values()),
            "originals": list(self._originals.values()),
            "numbers": [numbers_C.detach() for numbers_C in self._numbers.values()],
            "draws": self._generator.get_state(),
        }
        return super().state_dict() | ours

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping) -> None:
        """Go on where the optimizer that gave the state was, and write its numbers into the weights.

        Raises:
            ValueError: the state is of other numbers or of another model; nothing is changed then.
        """
        if missing := {"names", "indices", "originals", "numbers", "draws"} - state_dict.keys():
            raise ValueError(f"the state is of another optimizer: it lacks {', '.join(sorted(missing))}")
        if state_dict["names"] != list(self._indices):
            raise ValueError("the state is of an optimizer that moves numbers of other tensors")
        theirs = zip(self._indices, state_dict["indices"], state_dict["originals"], strict=True)
        for name, index_C, original_C in theirs:
            if not torch.equal(index_C.to(self._indices[name].device), self._indices[name]):
                raise ValueError(f"the state is of an optimizer that moves other numbers of {name}")
            original_C = original_C.to(self._originals[name])
            if not torch.equal(bits(original_C), bits(self._originals[name])):
                raise ValueError(f"the state is of a model in which {name} held other numbers before the first step")
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for numbers_C, saved_C in zip(self._numbers.values(), state_dict["numbers"], strict=True):
            numbers_C.copy_(saved_C)
        self.write()
        self._generator.set_state(state_dict["draws"].cpu())

    def _chosen(self, name: str) -> Tensor:
        return self._weights[name].detach().view(-1)[self._indices[name]]

    def _gather(self, name: str, weight: nn.Parameter) -> None:
        """Keep of a weight's gradient what is chosen."""
        numbers_C = self._numbers[name]
        found_C = weight.grad.reshape(-1)[self._indices[name]].to(numbers_C.dtype)
        weight.grad = None
        numbers_C.grad = found_C if numbers_C.grad is None else numbers_C.grad.add_(found_C)


def _new_state(numbers_C: Tensor, group: dict) -> dict[str, Tensor]:
    """Adam counts steps number by number, or one that was dropped would step too far."""
    if group["rule"] == "sgd":
        return {"momentum": torch.zeros_like(numbers_C)} if group["momentum"] else {}
    return {key: torch.zeros_like(numbers_C) for key in ("first", "second", "steps")}


def _sgd(numbers: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
    """torch.optim.SGD, in place."""
    if group["weight_decay"]:
        grad = grad + group["weight_decay"] * numbers
    if group["momentum"]:
        grad = state["momentum"].mul_(group["momentum"]).add_(grad)
    numbers.sub_(grad, alpha=group["lr"])


def _adam(numbers: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict) -> None:
    """torch.optim.Adam or AdamW, in place."""
    (beta1, beta2), decay = group["betas"], group["weight_decay"]
    if group["rule"] == "adamw":
        numbers.mul_(1 - group["lr"] * decay)
    elif decay:
        grad = grad + decay * numbers
    steps = state["steps"].add_(1)
    first = state["first"].lerp_(grad, 1 - beta1) / -torch.expm1(steps * math.log(beta1))
    second = state["second"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2) / -torch.expm1(steps * math.log(beta2))
    numbers.addcdiv_(first, second.sqrt_().add_(group["eps"]), value=-group["lr"])


def _check_settings(lr, rule, momentum, betas, eps, weight_decay, drop) -> None:
    if rule not in ("sgd", "adam", "adamw"):
        raise ValueError(f"rule is {rule!r}, must be 'sgd' or 'adam' or 'adamw'")
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}, must be at least 0")
    for name, value in (("momentum", momentum), ("drop", drop)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}, must be at least 0 and below 1")
    if not all(0 < beta < 1 for beta in betas):
        raise ValueError(f"betas are {tuple(betas)}, must lie between 0 and 1")


def _check_indices(name: str, parameter: nn.Parameter | None, index_C: Tensor) -> None:
    if parameter is None:
        raise ValueError(f"numbers of {name} are chosen, which the model does not have")
    if parameter.numel() >= 2**31 or index_C.dtype != torch.int32:
        raise ValueError(f"{name} has {parameter.numel()} numbers and indices in {index_C.dtype}: they must fit int32")
    if not parameter.is_contiguous():
        raise ValueError(f"{name} is not contiguous, so its numbers have no places in a row")
    if int(index_C[0]) < 0 or int(index_C[-1]) >= parameter.numel() or not bool((index_C.diff() > 0).all()):
        raise ValueError(f"the places chosen in {name} are not ascending, or outside its {parameter.numel()} numbers")

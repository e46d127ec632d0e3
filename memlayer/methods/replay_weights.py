"""Relational experience replay: how much each new and each replayed example counts is learned while they are.

A small net sees of each pair of a new and a replayed example both losses and both sizes of the logits, and gives a
weight to each. It is trained by what its weights lead to: a virtual step of the model with them, after which the loss
on the replayed examples should be low.

    loss(w) = mean(w_new * loss_new) + mean(w_old * loss_old)
    theta'  = theta - rate * gradient of loss(w)          w <- descend the mean of loss_old at theta'

Source: Wang et al., arXiv:2112.15402, and its released code: the net, both losses, the virtual step, fixed weights
(1, beta) at first. Ours, since a sequence has many tokens: a loss is the mean over a sequence's counted tokens, a size
the mean norm of its logits there; and the virtual step may be of any subset of parameters, a LoRA's or a memory's rows,
where the code takes all of them or the last layer.

Shapes: B pairs of examples, L tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from memlayer.data.qa import IGNORED, MASKS
from memlayer.methods.gradient_projection import dot


class ReplayWeights(nn.Module):
    """The net: a branch for the losses and one for the sizes, added, then one weight for each example of a pair.

    Args:
        hidden: numbers between the layers.
    """

    def __init__(self, hidden: int = 16):
        super().__init__()
        self.of_losses, self.of_sizes = nn.Linear(2, hidden), nn.Linear(2, hidden)
        self.to_weights = nn.Linear(hidden, 2)

    def forward(self, losses_B2: Tensor, sizes_B2: Tensor) -> Tensor:
        """Weights between 0 and 1 of the new and the replayed example of each pair, shape (B, 2).

        Args:
            losses_B2: of each new example and of its replayed one; no gradient flows back into them.
            sizes_B2: of their logits.
        """
        losses_BH, sizes_BH = self.of_losses(losses_B2.detach()), self.of_sizes(sizes_B2.detach())
        return self.to_weights(losses_BH.relu() + sizes_BH.relu()).sigmoid()


def losses_and_sizes(logits_BLV: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sequence the mean loss of its counted tokens, and the mean norm of the logits that predict them.

    Raises:
        ValueError: a sequence has no counted token.
    """
    logits_BTV, labels_BT = logits_BLV[:, :-1], labels_BL[:, 1:]
    logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    counted_BT = labels_BT != IGNORED
    if not (number_B := counted_BT.sum(1)).all():
        raise ValueError(f"{int((number_B == 0).sum())} of {len(number_B)} sequences have no token that counts")
    nats_BT = F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none", ignore_index=IGNORED)
    return nats_BT.sum(1) / number_B, (logits_BTV.norm(dim=-1) * counted_BT).sum(1) / number_B


def weighted_loss(losses_B2: Tensor, weights_B2: Tensor) -> Tensor:
    """mean(w_new * loss_new) + mean(w_old * loss_old); with weights (1, beta) it is plain experience replay."""
    return (weights_B2 * losses_B2).mean(0).sum()


def pair_losses(
    model: nn.Module,
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses and sizes of each new example and of the replayed one in its place, both of shape (B, 2).

    Args:
        parameters: by name, in place of the model's own.

    Raises:
        ValueError: there are not as many of one as of the other, or a sequence has no counted token.
    """
    if len(new["labels"]) != len(old["labels"]):
        raise ValueError(f"{len(new['labels'])} new examples and {len(old['labels'])} replayed ones are no pairs")
    found = [losses_and_sizes(_logits(model, batch, parameters), batch["labels"]) for batch in (new, old)]
    losses_B2, sizes_B2 = (torch.stack(each, dim=1) for each in zip(*found))
    return losses_B2, sizes_B2


def meta_gradient(
    model: nn.Module,
    weights_B2: Tensor,
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    rate: float,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss on the replayed examples after a virtual step with these weights, and its gradient in the weights.

    The step is linear in them, so the gradient is exact without differentiating twice, which the kernels of a memory
    cannot: of each example, -rate / B times the product of its loss's gradient and that of the replayed loss after the
    step. That takes a backward pass an example. The model is not changed and gets no gradient.

    Args:
        weights_B2: of the new and the replayed example of each pair; no gradient flows back into them.
        rate: of the virtual step.
        names: of the parameters that take it; None is all that require gradients. Few of them make it cheap.

    Raises:
        ValueError: a name is none of the model's trainable parameters, or as of ``pair_losses``.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := sorted({*(names or ())} - {*trainable}):
        raise ValueError(f"the model has no trainable parameter {missing[0]!r}")
    start = {name: trainable[name].detach().requires_grad_() for name in names or trainable}
    losses_B2, _ = pair_losses(model, new, old, start)
    step = _gradients(weighted_loss(losses_B2, weights_B2.detach()), start)
    with torch.no_grad():
        moved = {n: p if g is None else p - rate * g for (n, p), g in zip(start.items(), step)}
    moved = {name: tensor.detach().requires_grad_() for name, tensor in moved.items()}
    after = losses_and_sizes(_logits(model, old, moved), old["labels"])[0].mean()
    towards = _gradients(after, moved)
    along = [sum(map(dot, _gradients(loss, start), towards)) for loss in losses_B2.flatten()]
    gradient_B2 = torch.tensor(along, device=losses_B2.device).view(-1, 2) * (-rate / len(losses_B2))
    return after.detach(), gradient_B2


def meta_step(
    model: nn.Module,
    weights: ReplayWeights,
    optimizer: torch.optim.Optimizer,
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    rate: float,
    names: Sequence[str] | None = None,
) -> float:
    """One step of the net, by its own optimizer (the code's: Adam, rate 1e-3, decay 1e-4).

    Returns:
        the loss on the replayed examples after the virtual step, before the net's.
    """
    with torch.no_grad():
        losses_B2, sizes_B2 = pair_losses(model, new, old)
    weights_B2 = weights(losses_B2, sizes_B2)
    loss, gradient_B2 = meta_gradient(model, weights_B2, new, old, rate, names)
    weights_B2.backward(gradient_B2.to(weights_B2.dtype))
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)


def _logits(model: nn.Module, batch: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | None) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key not in ("labels", *MASKS)} | {"use_cache": False}
    if parameters is None:
        return model(**inputs).logits
    return functional_call(model, dict(parameters), (), inputs).logits

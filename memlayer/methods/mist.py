"""MIST: before a method learns something new, tune the few numbers that tell it apart, then freeze the model again.

    score     the mean squared gradient of an InfoNCE loss, over one pass, with nothing moving
    choose    the top share of each matrix
    tune      some passes of SGD on that loss, of the chosen numbers alone; each step leaves out most of them
    refreeze  and hand the model to any method, the host

Source: arXiv:2505.19943, whose hosts classify. ``adapt`` is after that paper as it describes itself: a dropped number
does not move in that step. Ours are: matrices of linear layers are chosen from, so no bias or norm moves; top share by
topk; float32 numbers for a model in half precision; the tuning goes off again exactly; and, for facts, a lesson's
wordings in the place of a class's images.

``ReleasedMist`` is what the released code does instead (zhwhu/MIST, c5f92f6, written from its description): a tenth of
each tensor and all of every bias and norm, weight decay and momentum that move whatever was not chosen or was dropped,
and two rules over tasks that the paper does not tell. "Mutual information" is the paper's word for the loss.

What the host's statistics were made from before, such as prototypes of earlier tasks or background counts, is of the
model before; nothing here repairs that.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from memlayer.decoders.mapped import refuse_mapped
from memlayer.methods.delta import SparseDelta
from memlayer.methods.infonce import (
    lesson_losses,
    next_of_its_label,
    projection,
    released_infonce,
    supervised_infonce,
)
from memlayer.methods.sparse_mask import linear_weights, squared_gradients, top_share
from memlayer.methods.sparse_optimizer import SparseOptimizer

Losses = Callable[[], Iterable[Tensor]]
EPOCHS, HEAD_LR = 19, 0.01
QUANTILE_LIMIT = 2**24


def adapt(
    model: nn.Module,
    head: nn.Module,
    losses: Losses,
    density: float = 0.05,
    drop: float = 0.9,
    epochs: int = EPOCHS,
    lr: float = 1e-4,
    momentum: float = 0.9,
    seed: int = 0,
) -> SparseDelta:
    """Score, choose and tune on what comes next; the defaults are the paper's.

    Args:
        model: all that ``linear_weights`` finds in it is chosen from; its mode stays, and evaluation mode is advised.
        head: from the model's hidden states to what the loss compares; it is trained too, and may be kept for the next
            call, as the paper does.
        losses: makes the losses of one pass over what comes next, one by one.
        density: share of each matrix that is chosen.
        drop: share of the chosen numbers that a step leaves out.
        epochs: passes after the one that scores.
        lr, momentum: of the model's numbers; the head has a rate of its own, HEAD_LR.
        seed: of the draws of ``drop``.

    Returns:
        what has changed; ``revert`` takes it off to the last bit.

    Raises:
        ValueError: a number is out of range, there is no loss, or one is no finite number; the model is then as it was.
    """
    chosen = top_share(squared_gradients(model, linear_weights(model), losses()), density)
    head.zero_grad()
    return tune(model, chosen, head, losses, epochs, lr, momentum, drop, seed)


def tune(
    model: nn.Module,
    chosen: Mapping[str, Tensor],
    head: nn.Module,
    losses: Losses,
    epochs: int = EPOCHS,
    lr: float = 1e-4,
    momentum: float = 0.9,
    drop: float = 0.9,
    seed: int = 0,
) -> SparseDelta:
    """The third step alone, of numbers that were chosen in any way; see ``adapt``."""
    optimizer = SparseOptimizer(model, chosen, lr, momentum=momentum, drop=drop, seed=seed)
    of_head = torch.optim.SGD(head.parameters(), HEAD_LR, momentum=momentum)
    try:
        for epoch in range(epochs):
            for loss in losses():
                _check_finite(loss, epoch, lr)
                loss.backward()
                optimizer.step()
                of_head.step()
                of_head.zero_grad()
    except ValueError:
        optimizer.detach().revert(model)
        raise
    return optimizer.detach()


@dataclass
class ReleasedMist:
    """The released code's tuning, task after task.

    Of each task: score over one pass; take all of a tensor whose name holds one of DENSE, and of any other the numbers
    whose score reaches the quantile, which is everything where most scores are 0; multiply each step's gradient by that
    mask, by a fresh draw and by ``overlap_penalty`` to the power of how many earlier tasks took a number; step all with
    SGD, momentum and weight decay. Afterwards the highest scores of each tensor get no gradient ever again.

    Attributes:
        density: share of each tensor; the released configs say 0.1, the paper 0.05.
        freeze_top: share frozen after a task: 0.0005 in the released RanPAC, 0 (the one highest) in its SimpleCIL.
        taken: per tensor, by how many tasks each number was.
        frozen: per tensor, which numbers are.
    """

    density: float = 0.1
    drop: float = 0.9
    overlap_penalty: float = 0.9
    freeze_top: float = 0.0005
    epochs: int = EPOCHS
    lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    taken: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)

    DENSE = ("bias", "norm", "fc.weight", "fc.sigma", "simclr")

    def adapt(self, model: nn.Module, head: nn.Module, losses: Losses, seed: int = 0) -> SparseDelta:
        """Tune for one task; see ``adapt`` of this module for what is given and returned.

        Raises:
            ValueError: a tensor is larger than torch.quantile takes, there is no loss, or one is no finite number; the
                model is then as it was.
        """
        parameters = dict(model.named_parameters())
        if large := [name for name, p in parameters.items() if p.numel() > QUANTILE_LIMIT and not self._is_dense(name)]:
            raise ValueError(
                f"{large[0]} has {parameters[large[0]].numel()} numbers, and the released code chooses by "
                f"torch.quantile, which takes {QUANTILE_LIMIT}: tune without paper_code"
            )
        scores = squared_gradients(model, parameters, losses())
        head.zero_grad()
        for name in scores.keys() & self.frozen.keys():
            scores[name].masked_fill_(self.frozen[name], 0.0)
        masks = {
            name: torch.ones_like(score, dtype=torch.bool) if self._is_dense(name) else _reaching(score, self.density)
            for name, score in scores.items()
        }
        delta = self._train(model, parameters, masks, head, losses, seed)
        for name, score in scores.items():
            if not self._is_dense(name):
                self.frozen[name] = self.frozen.get(name, False) | _reaching(score, self.freeze_top)
                self.taken[name] = self.taken.get(name, 0) + masks[name].int()
        return delta

    def _is_dense(self, name: str) -> bool:
        return any(word in name for word in self.DENSE)

    def _train(self, model, parameters, masks, head, losses, seed) -> SparseDelta:
        originals = {name: p.detach().flatten().clone() for name, p in parameters.items()}
        everything = {
            name: torch.arange(p.numel(), dtype=torch.int32, device=p.device) for name, p in parameters.items()
        }
        required, draws = [(p, p.requires_grad) for p in parameters.values()], torch.Generator().manual_seed(seed)

        def heed(name: str, gradient: Tensor) -> Tensor:
            gradient = gradient * (torch.rand(gradient.shape, generator=draws) >= self.drop).to(gradient.device)
            if name in self.frozen:
                gradient = gradient * ~self.frozen[name] * self.overlap_penalty ** self.taken[name]
            return gradient * masks[name] if name in masks else gradient

        model.requires_grad_(True)
        handles = [p.register_hook(partial(heed, name)) for name, p in parameters.items()]
        handles += [p.register_hook(partial(heed, "head")) for p in head.parameters()]
        groups = [{"params": list(parameters.values())}, {"params": list(head.parameters()), "lr": HEAD_LR}]
        optimizer = torch.optim.SGD(groups, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        try:
            for epoch in range(self.epochs):
                for loss in losses():
                    _check_finite(loss, epoch, self.lr)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        except ValueError:
            SparseDelta.between(parameters, everything, originals).revert(model)
            raise
        finally:
            optimizer.zero_grad()
            for handle in handles:
                handle.remove()
            for p, was in required:
                p.requires_grad_(was)
        return SparseDelta.between(parameters, everything, originals)


def _reaching(score: Tensor, share: float) -> Tensor:
    """As the released code has it: with a threshold of 0, all."""
    return score >= torch.quantile(score.flatten(), 1 - share)


def _check_finite(loss: Tensor, epoch: int, lr: float) -> None:
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss is {loss.item()} in epoch {epoch + 1} of MIST: a rate of {lr:g} may be too high")


def adapt_to_lessons(
    model: nn.Module, lessons: Sequence[Mapping[str, Tensor]], seed: int, paper_code: bool = False, **settings
) -> SparseDelta:
    """MIST on facts: a lesson's wordings belong together, at the last token of each prompt.

    Args:
        model: a causal language model of transformers.
        lessons: a batch each; see ``infonce.lesson_losses``.
        seed: of the head, of the order of the lessons in each pass, and of the draws of ``drop``.
        paper_code: tune as ``ReleasedMist`` and with its loss, where the next wording is a prompt's other view.
        settings: of ``adapt``, or of ``ReleasedMist``.

    Raises:
        ValueError: there are fewer than two lessons, one has no prompt or none has two wordings, or as of ``adapt``.
    """
    head = projection(model.config.get_text_config().hidden_size, seed, model.device)
    draws = torch.Generator().manual_seed(seed)

    def loss(z_BP: Tensor, labels_B: Tensor) -> Tensor:
        if paper_code:
            return released_infonce(z_BP, labels_B, next_of_its_label(labels_B))
        return supervised_infonce(z_BP, labels_B)

    def losses() -> Iterable[Tensor]:
        order = torch.randperm(len(lessons), generator=draws).tolist()
        return lesson_losses(model, head, lessons, order, loss)

    if paper_code:
        refuse_mapped(model, "MIST as released tunes whole tables")
        return ReleasedMist(**settings).adapt(model, head, losses, seed)
    return adapt(model, head, losses, seed=seed, **settings)

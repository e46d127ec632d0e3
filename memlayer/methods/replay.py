"""Replay: beside each lesson the model sees again some of what it should keep.

With the target "text" a step trains on the replayed examples too (experience replay). With the target "base" it is
held to what the untouched model said of them: KL(base || model) over the next token. Where the examples are texts that
the untouched model wrote itself, that is self-generated replay, after ZS-IL (arXiv:2103.12216), whose learner makes
its own inputs as well, but by inverting an image classifier; for language models see arXiv:2403.01244. Ours: the
base's distribution is kept as its likeliest tokens and one number for all others, so that no second model is held, and
the divergence is exact when every token is kept and never larger than the whole one.

Shapes: B examples, L tokens, C vocabulary, K tokens kept of a distribution.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlayer.data.qa import IGNORED, MASKS, collate
from memlayer.methods.terms import Term, unheard

ALMOST_ALL = 1 - 1e-6  # of a probability: what the kept tokens leave to all others is at least the rest


class Replay(Term):
    """Adds the loss of a few replayed examples to every step.

    Args:
        examples: what ``data.qa.encode`` returns; a step draws from all of them.
        pad_token_id: what fills a batch.
        batch_size: examples of one micro-batch.
        weight: of this loss beside the lesson's.
        target: "text" or "base".
        loss_on: tokens that count, as in ``data.qa.collate``.
        seed: of what is drawn; each process of a run takes another.
        num_kept: K, with the target "base".

    Raises:
        ValueError: fewer examples than a batch has.
    """

    def __init__(
        self,
        examples: Sequence[dict],
        pad_token_id: int,
        batch_size: int = 8,
        weight: float = 1.0,
        target: Literal["text", "base"] = "text",
        loss_on: Literal["all", "answer"] = "all",
        seed: int = 0,
        num_kept: int = 64,
    ):
        if len(examples) < batch_size:
            raise ValueError(f"replay of {batch_size} examples a step, there are {len(examples)}")
        self._examples, self._batch_size, self._weight = list(examples), batch_size, weight
        self._target, self._seed, self._num_kept = target, seed, num_kept
        self._collate = {"pad_token_id": pad_token_id, "loss_on": loss_on}
        self._base: list[tuple[Tensor, Tensor]] = []
        self._drawn = (-1, 0)  # the step of the latest draw, and how many there were in it

    @torch.no_grad()
    def begin(self, model: nn.Module, progress: Callable[[int], object] = unheard) -> None:
        """With the target "base", keep what the untouched model says of every example."""
        if self._target == "text":
            return
        was_training = model.training
        model.eval()
        for start in range(0, len(self._examples), self._batch_size):
            some = self._examples[start : start + self._batch_size]
            logits_BLC = model(**_inputs(self._batch(some), model)).logits[:, :-1]
            top_BLK = F.log_softmax(logits_BLC.float(), dim=-1).topk(min(self._num_kept, logits_BLC.shape[-1]))
            for example, logp_LK, token_LK in zip(some, top_BLK.values, top_BLK.indices):
                length = example["length"] - 1  # nothing is predicted behind the last token
                self._base.append((logp_LK[:length].cpu(), token_LK[:length].int().cpu()))
            progress(len(some))
        model.train(was_training)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """The weighted loss of the next few examples."""
        drawn = self._draw()
        inputs = _inputs(self._batch([self._examples[index] for index in drawn]), model)
        self.examples += len(drawn)
        self.tokens += sum(self._examples[index]["length"] for index in drawn)
        if self._target == "text":
            return self._weight * model(**inputs).loss
        counts_BL = inputs.pop("labels")[:, 1:] != IGNORED
        logits_BLC = model(**inputs).logits[:, :-1]
        logp_BLK, token_BLK = self._kept(drawn, logits_BLC)
        return self._weight * kl_of_kept(logp_BLK, token_BLK, logits_BLC)[counts_BL].mean()

    def _draw(self) -> list[int]:
        """The numbers of the next examples: they depend on the step and on how many draws it has had."""
        step, number = self._drawn
        self._drawn = self.step, number + 1 if step == self.step else 0
        generator = torch.Generator().manual_seed(hash((self._seed, *self._drawn)) % 2**63)
        return torch.randperm(len(self._examples), generator=generator)[: self._batch_size].tolist()

    def _batch(self, examples: Sequence[dict]) -> dict[str, Tensor]:
        return collate(examples, **self._collate)

    def _kept(self, drawn: Sequence[int], like_BLC: Tensor) -> tuple[Tensor, Tensor]:
        kept = [self._base[index] for index in drawn]
        logp_BLK = nn.utils.rnn.pad_sequence([logp_LK for logp_LK, _ in kept], batch_first=True, padding_value=-1e4)
        token_BLK = nn.utils.rnn.pad_sequence([token_LK for _, token_LK in kept], batch_first=True)
        return logp_BLK.to(like_BLC.device), token_BLK.long().to(like_BLC.device)


def kl_of_kept(logp_BLK: Tensor, token_BLK: Tensor, logits_BLC: Tensor) -> Tensor:
    """KL(base || model) at each position, from the base's likeliest tokens and what it leaves to all others, in nats.

    Args:
        logp_BLK: log-probability of each kept token, of the base.
        token_BLK: which these tokens are.
        logits_BLC: of the model.

    Returns:
        kl_BL: float32. Merging tokens into one never adds to a divergence, so the whole one is at least this.
    """
    ours_BLK = F.log_softmax(logits_BLC.float(), dim=-1).gather(-1, token_BLK)
    kl_BL = (logp_BLK.exp() * (logp_BLK - ours_BLK)).sum(-1)
    if token_BLK.shape[-1] == logits_BLC.shape[-1]:
        return kl_BL
    rest_BL, ours_rest_BL = (torch.log1p(-each.exp().sum(-1).clamp(max=ALMOST_ALL)) for each in (logp_BLK, ours_BLK))
    return kl_BL + rest_BL.exp() * (rest_BL - ours_rest_BL)


def _inputs(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items() if key not in MASKS}

"""A term against learning phrasings by heart: n-grams of the lessons may not become much likelier than they were.

Source: after Slack and Al Moubayed, arXiv:2510.11372. The paper's, as far as public texts say: a penalty beside the
loss where the tuned model's confidence in an n-gram of the training text exceeds the pretrained model's by more than a
margin. Ours, since its equation stands in an appendix that we have not seen:

    confidence(w) = exp(mean of log p(token) over the n tokens of the window w)
    penalty       = mean over windows of max(0, confidence now - confidence before - margin)

A fact is meant to be known by heart, so windows that hold a token of an answer are exempt unless asked for. What the
untouched model says is kept once for all lessons, a float a token: no second model is held.

Shapes: B sequences, L tokens, W windows of a sequence (L - n), V vocabulary.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from memlayer.evaluation.qa import evaluating


def token_log_probs(logits_BLV: Tensor, input_ids_BL: Tensor) -> Tensor:
    """How likely each token but the first is behind those before it: log p_BT, float32, T = L - 1."""
    log_p_BTV = logits_BLV[:, :-1].float().log_softmax(-1)
    return log_p_BTV.gather(-1, input_ids_BL[:, 1:, None])[..., 0]


def ngram_penalty(log_p_BT: Tensor, reference_BT: Tensor, counted_BT: Tensor, n: int, margin: float) -> Tensor | None:
    """By how much windows of n tokens are likelier than the reference and the margin allow, on average.

    Args:
        log_p_BT: log-probabilities of the tokens now.
        reference_BT: what they were before; no gradient.
        counted_BT: bool; a window counts where all its tokens do.
        n: tokens of a window.
        margin: how much of confidence, a probability, an n-gram may gain for nothing.

    Returns:
        the mean over the windows that count, between 0 and 1; None where none counts.
    """
    if log_p_BT.shape[1] < n:
        return None
    counted_BW = counted_BT.unfold(1, n, 1).all(-1)
    if not counted_BW.any():
        return None
    now_BW, before_BW = (each.unfold(1, n, 1).mean(-1).exp() for each in (log_p_BT, reference_BT.detach()))
    return (now_BW - before_BW - margin).clamp(min=0)[counted_BW].mean()


@torch.no_grad()
def reference_log_probs(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[bytes, Tensor]:
    """What a model says of the tokens of each sequence, to be looked up by the sequence.

    Args:
        model: any causal language model; it is left as found.
        batches: ``input_ids`` and ``attention_mask``, padded on either side.

    Returns:
        per sequence, by ``sequence_key``, log p of each token but the first, float32, on the CPU.
    """
    references = {}
    with evaluating(model):
        for batch in batches:
            ids_BL, there_BL = batch["input_ids"], batch["attention_mask"].bool()
            logits_BLV = model(input_ids=ids_BL, attention_mask=batch["attention_mask"]).logits
            for ids_L, there_L, log_p_T in zip(ids_BL, there_BL, token_log_probs(logits_BLV, ids_BL)):
                references[sequence_key(ids_L[there_L])] = log_p_T[(there_L[1:] & there_L[:-1])].cpu()
    return references


def sequence_key(ids_L: Tensor) -> bytes:
    """A sequence without padding as a key of a dict."""
    return ids_L.to("cpu", torch.int32).numpy().tobytes()


class NGramRegulariser:
    """The penalty as a term: ``loss`` gives what is to be added to a step's loss.

    Args:
        batches: all sequences that will be taught.
        n: tokens of a window.
        margin: see ``ngram_penalty``.
        weight: of the penalty beside the loss.
        exempt_answers: whether windows that hold a token of an answer are left out.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        batches: Iterable[Mapping[str, Tensor]],
        n: int = 4,
        margin: float = 0.1,
        weight: float = 1.0,
        exempt_answers: bool = True,
    ):
        if n < 1 or not 0 <= margin < 1 or weight < 0:
            raise ValueError(f"n={n}, margin={margin}, weight={weight}: n is 1 or more, 0 <= margin < 1, 0 <= weight")
        self.n, self.margin, self.weight, self.exempt_answers = n, margin, weight, exempt_answers
        self._batches, self._references = batches, {}

    def begin(self, model: nn.Module) -> None:
        """Keep what the untouched model says of the lessons."""
        self._references = reference_log_probs(model, self._batches)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], logits_BLV: Tensor) -> Tensor | None:
        """The weighted penalty of a batch; None where no window counts.

        Args:
            batch: ``input_ids``, ``attention_mask`` and, to exempt answers, ``answer_mask``. Windows count whatever
                the labels say, so that a lesson of which only the answer is trained on keeps its phrasing too.
            logits_BLV: of the last positions of the batch, or all.

        Raises:
            ValueError: a sequence that ``begin`` has not seen, or a batch without ``answer_mask`` to exempt answers.
        """
        length, total = logits_BLV.shape[1], batch["input_ids"].shape[1]
        ids_BL, there_BL = batch["input_ids"][:, -length:], batch["attention_mask"].bool()[:, -length:]
        counted_BT = there_BL[:, 1:] & there_BL[:, :-1]
        if self.exempt_answers:
            if "answer_mask" not in batch:
                raise ValueError(f"answers cannot be exempt: the batch has no 'answer_mask', only {sorted(batch)}")
            # A position of the answer mask predicts the token behind it.
            counted_BT = counted_BT & ~batch["answer_mask"].bool()[:, -length:][:, :-1]
        reference_BT = self._reference(batch, total)[:, -(length - 1) :] if length > 1 else counted_BT.float()
        log_p_BT = token_log_probs(logits_BLV, ids_BL)
        penalty = ngram_penalty(log_p_BT, reference_BT.to(log_p_BT.device), counted_BT, self.n, self.margin)
        return None if penalty is None else self.weight * penalty

    def _reference(self, batch: Mapping[str, Tensor], length: int) -> Tensor:
        there_BL = batch["attention_mask"].bool().cpu()
        reference_BT = torch.zeros(len(there_BL), length - 1)
        for row, (ids_L, there_L) in enumerate(zip(batch["input_ids"].cpu(), there_BL)):
            if (known := self._references.get(sequence_key(ids_L[there_L]))) is None:
                raise ValueError(
                    f"sequence {row} of the batch, of {int(there_L.sum())} tokens, is none of the "
                    f"{len(self._references)} that the reference was taken of: give all lessons, and call begin first"
                )
            reference_BT[row, there_L[1:] & there_L[:-1]] = known
        return reference_BT

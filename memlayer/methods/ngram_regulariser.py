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

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from memlayer.data.qa import collate
from memlayer.evaluation.qa import evaluating
from memlayer.methods.terms import Term, unheard


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


def sequence_key(ids_L: Tensor) -> bytes:
    """A sequence without padding as a key of a dict."""
    return ids_L.to("cpu", torch.int32).numpy().tobytes()


class NGramRegulariser(Term):
    """The penalty as a term, for whatever of the lessons is given to it.

    Args:
        examples: all that will be taught, as ``data.qa.encode`` returns it; the same ones may come again.
        pad_token_id: what fills a batch.
        n: tokens of a window.
        margin: see ``ngram_penalty``.
        weight: of the penalty beside the loss.
        exempt_answers: whether windows that hold a token of an answer are left out; a text has no answer.
        batch_size: examples at a time when the untouched model is asked.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        examples: Sequence[dict],
        pad_token_id: int,
        n: int = 4,
        margin: float = 0.1,
        weight: float = 1.0,
        exempt_answers: bool = True,
        batch_size: int = 32,
    ):
        if n < 1 or not 0 <= margin < 1 or weight < 0:
            raise ValueError(f"n={n}, margin={margin}, weight={weight}: n is 1 or more, 0 <= margin < 1, 0 <= weight")
        self._n, self._margin, self._weight, self._exempt_answers = n, margin, weight, exempt_answers
        different = {tuple(example["input_ids"]): example for example in examples}
        self._lessons, self._pad_token_id, self._batch_size = list(different.values()), pad_token_id, batch_size
        # Of each sequence, by its key: log p of each token but the first, and where its answer begins.
        self._references: dict[bytes, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def begin(self, model: nn.Module, progress: Callable[[int], object] = unheard) -> None:
        """Keep what the untouched model says of the lessons."""
        device = next(model.parameters()).device
        with evaluating(model):
            for start in range(0, len(self._lessons), self._batch_size):
                some = self._lessons[start : start + self._batch_size]
                batch = collate(some, self._pad_token_id)
                ids_BL, there_BL = (batch[key].to(device) for key in ("input_ids", "attention_mask"))
                log_p_BT = token_log_probs(model(input_ids=ids_BL, attention_mask=there_BL).logits, ids_BL).cpu()
                for example, log_p_T in zip(some, log_p_BT):
                    key = sequence_key(torch.tensor(example["input_ids"]))
                    self._references[key] = (log_p_T[: example["length"] - 1].clone(), example["answer_start"])
                progress(len(some))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
        """The weighted penalty of a batch; None where no window counts.

        Args:
            batch: ``input_ids`` and ``attention_mask``; windows count whatever its labels say.
            logits: of the last positions of the batch, or all: where prompts have none, they are not looked at.

        Raises:
            ValueError: a sequence that is none of the lessons, or ``begin`` was not called.
        """
        length = logits.shape[1]
        if length < 2:
            return None
        reference_BT, counted_BT = (each[:, 1 - length :].to(logits.device) for each in self._looked_up(batch))
        log_p_BT = token_log_probs(logits, batch["input_ids"][:, -length:])
        penalty = ngram_penalty(log_p_BT, reference_BT, counted_BT, self._n, self._margin)
        return None if penalty is None else self._weight * penalty

    def _looked_up(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the untouched model said of each token but the first, and which of them count."""
        ids_BL, there_BL = batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu()
        reference_BT, counted_BT = torch.zeros(ids_BL[:, 1:].shape), torch.zeros(ids_BL[:, 1:].shape, dtype=torch.bool)
        for row, (ids_L, there_L) in enumerate(zip(ids_BL, there_BL)):
            known = self._references.get(sequence_key(ids_L[there_L]))
            if known is None:
                raise ValueError(
                    f"sequence {row} of the batch, of {int(there_L.sum())} tokens, is none of the "
                    f"{len(self._references)} that the reference was taken of: give all lessons, and call begin first"
                )
            log_p_T, answer_start = known
            first = int(there_L.nonzero()[0])
            reference_BT[row, first : first + len(log_p_T)] = log_p_T
            # An answer that begins with the second token is a text's: it has no prompt to keep apart.
            until = answer_start - 1 if self._exempt_answers and answer_start > 1 else len(log_p_T)
            counted_BT[row, first : first + until] = True
        return reference_BT, counted_BT

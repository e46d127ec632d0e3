"""Probes: questions and text on which forgetting is measured, since the untouched model could do them.

Questions are asked by ``qa.answer_questions``; which of them the model knew is what it answered before anything was
changed (``known_before``). Text is measured in nats per token, window by window, so that two models are compared on
the same ones.

Shapes: W windows, L tokens of a window.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memlayer.evaluation.qa import Answered, evaluating


def known_before(answered: Sequence[Answered]) -> list[int]:
    """Where in a list of answers those are that were right: the questions that can be forgotten."""
    return [index for index, each in enumerate(answered) if each.exact_match]


def window_nats(
    model, windows_WL: Tensor, *, batch_size: int = 8, progress: Callable[[int], object] | None = None
) -> list[float]:
    """How unlikely a model finds each window of text.

    Args:
        windows_WL: token ids without padding, at least 2 of each window.
        batch_size: windows at a time; it changes speed and memory, not results.
        progress: called after each batch with the number of windows it held.

    Returns:
        per window the mean negative log likelihood of its tokens but the first, in nats.
    """
    found: list[float] = []
    with evaluating(model), torch.no_grad():
        for batch_BL in windows_WL.split(batch_size):
            batch_BL = batch_BL.to(model.device)
            logits_BLC = model(input_ids=batch_BL, use_cache=False).logits[:, :-1].float()
            nll_BL = F.cross_entropy(logits_BLC.transpose(1, 2), batch_BL[:, 1:], reduction="none")
            found += nll_BL.mean(1).tolist()
            if progress is not None:
                progress(len(batch_BL))
    return found

"""Logits of the last positions only: a prompt's are asked for by nobody, and the output head is a large part of a small
decoder's arithmetic.

The positions are named by a tensor, not by their number. transformers cuts by number into a view with gaps between
sequences, and torch multiplies such a view by frozen weights one sequence after the other, reading the whole head for
each of them: on a CPU a run of learning took a quarter longer.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

NAME = "logits_to_keep"


def can_keep_logits(forward: Callable) -> bool:
    """Whether a decoder's forward pass leaves out logits where it is told to."""
    return NAME in inspect.signature(forward).parameters


def kept_logits(forward: Callable, first: int, length: int, device: torch.device) -> dict[str, int | Tensor]:
    """What a decoder that can keep logits has to be told to compute those of positions ``first`` to ``length`` - 1."""
    if "Tensor" in str(inspect.signature(forward).parameters[NAME].annotation):
        return {NAME: torch.arange(first, length, device=device)}
    return {NAME: length - first}  # fuyu and its like take a number alone

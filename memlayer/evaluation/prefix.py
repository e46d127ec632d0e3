"""Read what all prompts begin with once: questions after the same answered ones share most of their tokens.

Four answered questions before each are two thirds of what a model would read. Their keys and values are computed once,
and copied for each batch. This is for models whose whole state is the plain cache of keys and values of every position;
any other (a sliding window, a state-space layer, a cache of its own) reads every prompt in full.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LEAST = 16  # tokens that prompts share; fewer are not worth the copies


@dataclass(frozen=True)
class Prefix:
    """The first tokens of every prompt and what the model keeps of them, for one sequence."""

    ids: list[int]
    cache: DynamicCache

    def copies(self, number: int) -> DynamicCache:
        """A cache of its own for a batch of ``number`` prompts, which generation may add to."""
        cache = deepcopy(self.cache)
        cache.batch_repeat_interleave(number)
        return cache


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, at least one being left of each."""
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def read_prefix(model, prompts: Sequence[Sequence[int]]) -> Prefix | None:
    """What two or more prompts share, read by the model; None where that is too little, or its cache is another."""
    if len(prompts) < 2 or (length := common_prefix(prompts)) < LEAST:
        return None
    ids = list(prompts[0][:length])
    found = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True)
    cache = getattr(found, "past_key_values", None)
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    return Prefix(ids, cache)

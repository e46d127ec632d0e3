"""Read what all prompts begin with once: questions after the same answered ones share most of their tokens.

Four answered questions before each are two thirds of what a model would read. Their keys and values are computed once,
and copied for each batch. This is for models whose whole state is the plain cache of keys and values of every position;
any other (a sliding window, a state-space layer, a cache of its own) reads every prompt in full. So does one that says
something else behind a prefix than behind the whole prompt, which is tried on one prompt first.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Shapes: H heads, P tokens of the prefix, D numbers of a key or value.
LEAST = 16  # tokens that prompts share; fewer are not worth the copies


@dataclass(frozen=True)
class Prefix:
    """The first tokens of every prompt and what the model keeps of them, for one sequence."""

    ids: list[int]
    cache: DynamicCache

    def copies(self, padding: Sequence[int]) -> DynamicCache:
        """A cache for a batch, which generation may add to: its first ``len(ids)`` columns, read already.

        Args:
            padding: of each prompt, how many columns of padding stand left of it.

        Padding pushes the last shared tokens of a prompt out of these columns; they are read again. So a batch is laid
        out as without a prefix, which families that count columns rather than positions depend on.
        """
        cache, last = deepcopy(self.cache), len(self.ids)
        for layer in cache.layers:
            for name in ("keys", "values"):
                (of_prefix_HPD,) = getattr(layer, name)
                shifted = [F.pad(of_prefix_HPD, (0, 0, min(pads, last), 0))[:, :last] for pads in padding]
                setattr(layer, name, torch.stack(shifted))
        return cache


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, at least one being left of each."""
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def read_prefix(model, prompts: Sequence[Sequence[int]]) -> Prefix | None:
    """What two or more prompts share, read by the model; None where that is too little, or the model is another."""
    if getattr(model.generation_config, "cache_implementation", None):  # generation then makes a cache of its own
        return None
    if len(prompts) < 2 or (length := common_prefix(prompts)) < LEAST:
        return None
    ids = list(prompts[0][:length])
    found = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True)
    cache = getattr(found, "past_key_values", None)
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    prefix = Prefix(ids, cache)
    return prefix if _says_the_same(model, list(min(prompts, key=len)), prefix) else None


def _says_the_same(model, prompt: list[int], prefix: Prefix) -> bool:
    """Whether what follows a prompt is the same when its beginning comes from the cache."""
    whole, tail = (torch.tensor([ids], device=model.device) for ids in (prompt, prompt[len(prefix.ids) :]))
    mask = torch.ones_like(whole)
    expected_C = model(input_ids=whole, attention_mask=mask, use_cache=False).logits[0, -1]
    try:
        found = model(input_ids=tail, attention_mask=mask, past_key_values=prefix.copies([0]), use_cache=True)
    except Exception:  # whatever a family raises that takes no cache from outside: it reads every prompt in full
        return False
    near = 1e-3 if expected_C.dtype == torch.float32 else 0.1  # sums are taken in another order
    found_C, expected_C = (logits_C.float().log_softmax(0) for logits_C in (found.logits[0, -1], expected_C))
    return bool((found_C - expected_C).abs().max() <= near)

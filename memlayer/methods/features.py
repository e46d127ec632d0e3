"""What a model makes of an example, as one vector: the mean of its last hidden states over the example's tokens."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from memlayer.data.qa import collate
from memlayer.evaluation.qa import evaluating
from memlayer.methods.terms import unheard


@torch.no_grad()
def mean_hidden_states(
    model: nn.Module,
    examples: Sequence[dict],
    pad_token_id: int,
    batch_size: int = 32,
    progress: Callable[[int], object] = unheard,
) -> np.ndarray:
    """The features of examples, float64, shape (examples, model width).

    Args:
        model: a transformers causal language model; it is left as found. Its states are those behind the last norm,
            which its head reads.
        examples: what ``data.qa.encode`` returns.
        pad_token_id: what fills a batch.
        batch_size: examples at a time; it changes speed and memory, not results.
        progress: called after each batch with the number of examples it held.
    """
    decoder, device = model.base_model, next(model.parameters()).device
    found = [torch.empty(0, model.config.get_text_config().hidden_size, dtype=torch.float64)]
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size], pad_token_id)
            ids_BL, there_BL = (batch[key].to(device) for key in ("input_ids", "attention_mask"))
            states_BLD = decoder(input_ids=ids_BL, attention_mask=there_BL, use_cache=False).last_hidden_state.double()
            found.append(((states_BLD * there_BL[..., None]).sum(1) / there_BL.sum(1, keepdim=True)).cpu())
            progress(len(ids_BL))
    return torch.cat(found).numpy()

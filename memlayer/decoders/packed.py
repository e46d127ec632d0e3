"""Whether a decoder keeps documents of one window apart, told by position numbers that start anew with each.

Given neither mask nor cache, transformers makes a mask of blocks of them wherever a family builds its masks with it:
Llama, Qwen, Gemma, GPT-2, mixtures of experts and most others, layers with a sliding window too. What carries a state
along (Mamba, RWKV, convolutions) or turns distances into a bias without position numbers (ALiBi) does not keep
documents apart. No table of families: the model is tried.

Shapes: B windows, L tokens, C entries of the vocabulary.
"""

import torch
from torch import nn

LENGTHS = (7, 12, 5)  # tokens of the documents that it is tried on
LEAK = 1e-3  # of the largest logit, in float32: sums in another order make 1e-6, a neighbour's state 1e-1


@torch.no_grad()
def leak_between_documents(model: nn.Module) -> float:
    """How far the documents before one change its logits, as a share of the largest logit.

    It is the median over all tokens that have documents before them: a memory may read another slot at one token where
    two slots score the same, which is no leak.
    """
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(model.config.vocab_size, (1, sum(LENGTHS)), generator=generator).to(model.device)
    positions_BL = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(model.device)
    training = model.training
    model.eval()
    try:
        packed_LC = model(input_ids=ids_BL, position_ids=positions_BL, use_cache=False).logits[0].float()
        alone = [model(input_ids=ids, use_cache=False).logits[0].float() for ids in ids_BL.split(LENGTHS, dim=1)]
    finally:
        model.train(training)
    alone_LC = torch.cat(alone)
    differ_L = (packed_LC - alone_LC).abs().amax(-1)[LENGTHS[0] :]
    return float(differ_L.median() / alone_LC.abs().max())


def check_keeps_apart(model: nn.Module) -> None:
    """Refuse a model whose documents hear each other.

    Raises:
        ValueError: it is one.
    """
    family = getattr(model.config, "base_model_type", model.config.model_type)
    advice = "with text.together=false a window holds one document"
    try:
        leak = leak_between_documents(model)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{family} takes no position numbers ({str(error).splitlines()[0]:.100}): {advice}") from error
    if not leak <= LEAK:
        raise ValueError(
            f"{family} does not keep documents of one window apart: the ones before move its logits by {leak:.1%} of "
            f"the largest; {advice}"
        )

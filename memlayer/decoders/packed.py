"""Whether a decoder keeps documents of one window apart, told by position numbers that start anew with each.

Given neither mask nor cache, transformers makes a mask of blocks of them wherever a family builds its masks with it:
Llama, Qwen, Gemma, GPT-2, mixtures of experts and most others, layers with a sliding window too. What carries a state
along (Mamba, RWKV, convolutions) or turns distances into a bias without position numbers (ALiBi) does not keep
documents apart. No table of families: the model is tried.

Shapes: B windows, L tokens, C entries of the vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LENGTHS = (7, 12, 5)  # tokens of the documents that it is tried on
# Of the largest logit, in float32: sums in another order make 1e-6, wrong positions 1e-2 in a model just made.
NEAR = 1e-3


def _window(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Token ids and position numbers of a few documents in one window, each of shape (1, L)."""
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(model.config.vocab_size, (1, sum(LENGTHS)), generator=generator)
    positions_BL = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return ids_BL.to(model.device), positions_BL.to(model.device)


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def hears_others(model: nn.Module) -> bool:
    """Whether the logits of a document depend on those before it, however little.

    What attention leaves out has a weight of exactly zero, and so has its gradient. The model may be one just made, in
    which a state that runs on says next to nothing yet.
    """
    ids_BL, positions_BL = _window(model)
    heard = []

    def keep(_module: nn.Module, _inputs: tuple, embedded_BLD: Tensor) -> Tensor:
        heard.append(embedded_BLD.detach().requires_grad_())
        return heard[0].clone()  # some families write into it

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad(), _at_rest(model):
            logits_BLC = model(input_ids=ids_BL, position_ids=positions_BL, use_cache=False).logits
            (gradient_BLD,) = torch.autograd.grad(logits_BLC[:, -LENGTHS[-1] :].float().square().sum(), heard[0])
    finally:
        handle.remove()
    return bool(gradient_BLD[:, : -LENGTHS[-1]].any())


@torch.no_grad()
def distance_from_alone(model: nn.Module) -> float:
    """How far the logits of documents in a window are from those they have alone, as a share of the largest.

    It is the median over all tokens that have documents before them: a memory may read another slot at one token where
    two slots score the same.
    """
    ids_BL, positions_BL = _window(model)
    with _at_rest(model):
        packed_LC = model(input_ids=ids_BL, position_ids=positions_BL, use_cache=False).logits[0].float()
        alone = [model(input_ids=ids, use_cache=False).logits[0].float() for ids in ids_BL.split(LENGTHS, dim=1)]
    alone_LC = torch.cat(alone)
    differ_L = (packed_LC - alone_LC).abs().amax(-1)[LENGTHS[0] :]
    return float(differ_L.median() / alone_LC.abs().max())


def check_keeps_apart(model: nn.Module) -> None:
    """Refuse a model whose documents hear each other, or do not begin at the first position.

    Raises:
        ValueError: it is one.
    """
    family = getattr(model.config, "base_model_type", model.config.model_type)
    advice = "with text.together=false a window holds one document"
    try:
        hears, distance = hears_others(model), distance_from_alone(model)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{family} takes no position numbers ({str(error).splitlines()[0]:.100}): {advice}") from error
    if hears:
        raise ValueError(f"{family} does not keep documents of one window apart, each hears those before it: {advice}")
    if not distance <= NEAR:
        raise ValueError(
            f"{family} does not number the positions of a window anew with each document, its logits are "
            f"{distance:.1%} of the largest away from those of the document alone: {advice}"
        )

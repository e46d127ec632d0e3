"""The model that a patch is made for: its weights outside the tables, and the patches it has.

A row means something in one model alone: other attention gives other hidden states, which read other slots. A patch
therefore keeps a SHA-256 over a sample of every weight outside the tables: 4,096 numbers evenly spread, or all of a
smaller weight. Training, quantising or merging an adapter moves nearly every number of a weight and is seen; a few
numbers that somebody alters in a large weight may not be. Reading all would take half a minute for 10 B parameters,
the sample takes milliseconds.

Embeddings count up to the vocabulary of the patch's model, so one that has grown since is the same. The sample is also
hashed as rounded to half precision, so that a copy in bfloat16 or float16 is the same.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memlayer.decoders.attach import memory_tables

SAMPLE = 4096
# From fine to coarse: models are compared in the coarsest precision that one of their weights has.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MARK = "memory_patches"
ANYWAY = "any_base=True, or --any-base on the command line, applies it all the same"


@dataclass(frozen=True)
class Base:
    """What a patch keeps of the model it is made for.

    Attributes:
        vocab_size: rows of its embeddings that count; None where it has none.
        weights_sha256: per precision, SHA-256 over the sample of its weights.
        patches: fingerprints of the patches it has.
    """

    vocab_size: int | None
    weights_sha256: dict[str, str]
    patches: list[str]

    @classmethod
    def of(cls, model: nn.Module, vocab_size: int | None = None) -> "Base | None":
        """The base of ``model`` as it is; None where a weight is offloaded to where it cannot be read."""
        weights, embeddings = _weights(model)
        if any(weight.is_meta for weight in weights.values()):
            return None
        vocab_size = vocab_size or min((len(weights[name]) for name in embeddings), default=None)
        digests = {precision: hashlib.sha256() for precision in PRECISIONS}
        for name, weight in sorted(weights.items()):
            weight = weight[:vocab_size] if name in embeddings else weight
            numbers = _sample(weight).cpu().float()
            for precision, digest in digests.items():
                digest.update(f"{name} {list(weight.shape)}\n".encode())
                digest.update(numbers.to(PRECISIONS[precision]).view(torch.uint8).numpy())
        return cls(vocab_size, {name: digest.hexdigest() for name, digest in digests.items()}, patches_of(model))

    @classmethod
    def of_json(cls, entry: object) -> "Base | None":
        """Read what ``dataclasses.asdict`` made; ValueError for anything else."""
        if entry is None:
            return None
        kinds = {"vocab_size": (int, type(None)), "weights_sha256": dict, "patches": list}
        known = isinstance(entry, dict) and entry.keys() == kinds.keys()
        if not (known and all(isinstance(entry[key], kind) for key, kind in kinds.items())):
            raise ValueError(f"base is {entry!r}, must have {', '.join(kinds)}")
        if entry["weights_sha256"].keys() != PRECISIONS.keys():
            raise ValueError(f"base has weights_sha256 for {sorted(entry['weights_sha256'])}, not {list(PRECISIONS)}")
        return cls(**entry)

    def check(self, model: nn.Module) -> None:
        """Refuse a model of other weights, or without a patch that the base had.

        Raises:
            ValueError: it is such a model, or one whose weights are offloaded and cannot be read.
        """
        found = Base.of(model, self.vocab_size)
        if found is None:
            raise ValueError(f"weights of the model are offloaded and cannot be compared with the patch's: {ANYWAY}")
        precision = _precision(model)
        if found.weights_sha256[precision] != self.weights_sha256[precision]:
            raise ValueError(
                f"the patch was made for a model with other weights outside the memory (in {precision}): {ANYWAY}"
            )
        if missing := [patch for patch in self.patches if patch not in found.patches]:
            raise ValueError(
                f"the patch was made on top of patch {', '.join(each[:12] for each in missing)}, which the model "
                f"lacks: apply that first; {ANYWAY}"
            )

    def same_weights(self, other: "Base") -> bool:
        """Whether both are of the same weights, in whatever precision."""
        sha256 = other.weights_sha256
        return any(self.weights_sha256[name] == sha256[name] for name in PRECISIONS)


def patches_of(model: nn.Module) -> list[str]:
    """Fingerprints of the patches that the model has, as its config says; saving and loading keeps them."""
    return list(getattr(getattr(_unwrapped(model), "config", None), MARK, ()))


def mark(model: nn.Module, patches: Sequence[str], had: bool) -> None:
    """Let the model's config say that it has these patches, or that it no longer has them."""
    config = getattr(_unwrapped(model), "config", None)
    if config is None:
        return
    kept = [patch for patch in patches_of(model) if patch not in patches]
    if marks := kept + list(patches) if had else kept:
        setattr(config, MARK, marks)
    elif hasattr(config, MARK):
        delattr(config, MARK)


def _precision(model: nn.Module) -> str:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return next((name for name in reversed(PRECISIONS) if PRECISIONS[name] in dtypes), "float32")


def _sample(weight: Tensor) -> Tensor:
    """The numbers of a weight that count, flat; the walk changes columns, whatever the width is."""
    flat = weight.detach().reshape(-1)
    if len(flat) <= SAMPLE:
        return flat
    step = len(flat) // SAMPLE
    i = torch.arange(SAMPLE, device=flat.device)
    return flat[i * len(flat) // SAMPLE + i * 7919 % step]


def _weights(model: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Parameters and persistent buffers outside the tables by name, and which of them are embeddings."""
    inner = _unwrapped(model)
    tables = tuple(f"{name}." for name in memory_tables(inner))
    modules = [getattr(inner, f"get_{which}put_embeddings", lambda: None)() for which in ("in", "out")]
    embedded = {id(weight) for module in modules if module is not None for weight in module.parameters()}
    state = {
        name: weight
        for name, weight in inner.state_dict(keep_vars=True).items()
        if isinstance(weight, Tensor) and not name.startswith(tables)
    }
    adapted = tuple(f"{name}." for name, module in inner.named_modules() if _below(module))
    weights, embeddings = {}, set()
    for name, weight in state.items():
        parts = name.split(".")
        if name.startswith(adapted) and not LOOKED_THROUGH & set(parts):
            continue  # an adapter's own
        bare = ".".join(part for part in parts if part not in LOOKED_THROUGH)
        weights[bare] = weight
        if id(weight) in embedded:
            embeddings.add(bare)
    return weights, embeddings


# Where wrappers keep what they wrap: torch.compile and PEFT's adapters.
LOOKED_THROUGH = {"_orig_mod", "base_layer", "original_module"}


def _below(module: nn.Module) -> bool:
    return any(name in module._modules for name in ("base_layer", "original_module"))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The bare model in torch.compile, DistributedDataParallel and PEFT, whatever is around it."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif (inner := model._modules.get("_orig_mod", model._modules.get("module"))) is not None:
            model = inner
        else:
            return model

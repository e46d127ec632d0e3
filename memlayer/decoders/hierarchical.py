"""Hierarchical memories put beside the feed-forward blocks of a decoder that is trained already.

After Pouransari et al. (arXiv:2510.02375). Theirs: routing by a whole text, not by token, over a tree of clusters that
is not learned; blocks beside the feed-forward blocks, coarse ones wider; a decoder that stays as it is. Ours: texts are
compared by the mean of the decoder's own hidden states at one layer, where they have a sentence encoder; down starts at
zero, so that inserting changes no logit; and blocks of all levels may stand at some layers only. Their training of
decoder and bank together is left out.

What a text may be routed by is for the caller to say (``attention_mask``): a question is routed without its answer, and
a text that is routed by all of its tokens has told each of them what comes after it. A question has to take the path of
the text that taught its answer: ``cluster_tree.routing_agreement`` says how often it does.

The memory is a module of its own beside the model, attached by hooks: the model's own numbers, names and files stay::

    memory = HierarchicalMemory(width, layers=[4, 8], sizes=(64, 16), branching=8, embed_at=4).fit(model, texts)
    memory.attach(model)
    with memory.routed(memory.paths(model, prompts)):
        loss = model(**batch).loss

Shapes: B sequences, L tokens, D width, P levels of a path.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memlayer.decoders.structure import decoder_layers
from memlayer.files import reading, writing
from memlayer.layers.cluster_tree import ClusterTree
from memlayer.layers.routed_blocks import RoutedBlocks

SETTINGS = "hierarchical_memory"  # in the file's metadata


class HierarchicalMemory(nn.Module):
    """A tree of clusters, and at some layers of a decoder the blocks of its nodes.

    Args:
        width: of the decoder, D.
        layers: where blocks stand.
        sizes: inner width of the blocks of each level, see ``RoutedBlocks``; as many as the tree is deep.
        branching: clusters that each cluster is parted into.
        embed_at: whose output the texts are compared by: hidden states after so many layers of the decoder.

    Raises:
        ValueError: no layer, or what tree and blocks refuse.
    """

    def __init__(self, width: int, layers: Sequence[int], sizes: Sequence[int], branching: int, embed_at: int):
        super().__init__()
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"layers are {list(layers)}: name one or more, each once")
        self.settings = {"width": width, "layers": list(layers), "sizes": list(sizes)}
        self.settings |= {"branching": branching, "embed_at": embed_at}
        self.tree = ClusterTree(branching, len(sizes), width)
        self.blocks = nn.ModuleDict({str(layer): RoutedBlocks(width, branching, sizes) for layer in layers})
        self._path_BP: Tensor | None = None

    @property
    def num_fetched(self) -> int:
        """Numbers that one sequence uses."""
        return sum(blocks.num_fetched for blocks in self.blocks.values())

    def fit(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], seed: int = 0) -> Self:
        """Grow the tree over texts: batches of ``input_ids`` and ``attention_mask``."""
        self.tree.fit(torch.cat([self.embedded(model, batch) for batch in batches]), seed)
        return self

    @torch.no_grad()
    def embedded(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean hidden state of each text over what its ``attention_mask`` shows, shape (B, D), without memory.

        Raises:
            ValueError: a text has no token to go by, or the decoder has fewer layers than ``embed_at``.
        """
        inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        if wrong := int((~inputs["attention_mask"].bool().any(1)).sum()):
            raise ValueError(f"{wrong} of {len(inputs['input_ids'])} texts have no token to be routed by")
        with self.routed(None):
            states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        at = self.settings["embed_at"]
        if not 0 <= at < len(states):
            raise ValueError(f"embed_at is {at}, the decoder has {len(states) - 1} layers")
        mask_BL1 = inputs["attention_mask"][..., None]
        return (states[at].float() * mask_BL1).sum(1) / mask_BL1.sum(1)

    def paths(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The path of each text of a batch, int64, shape (B, P)."""
        return self.tree(self.embedded(model, batch))

    @contextmanager
    def routed(self, path_BP: Tensor | None) -> Iterator[None]:
        """A context in which the sequences of each batch take these paths; without one the model is as it was.

        Under activation checkpointing the backward pass belongs inside as well.
        """
        before, self._path_BP = self._path_BP, path_BP
        try:
            yield
        finally:
            self._path_BP = before

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Have the model's blocks be heard together with these; returns what takes them off again.

        Raises:
            ValueError: the model is no decoder that memory fits, has another width, or no such layer.
        """
        layers, ffn_name = decoder_layers(model)
        wanted, width = self.settings["layers"], model.config.hidden_size
        if width != self.settings["width"] or not all(0 <= layer < len(layers) for layer in wanted):
            raise ValueError(
                f"the memory is for layers {wanted} of width {self.settings['width']}, the model has layers 0 to "
                f"{len(layers) - 1} of width {width}"
            )
        stack = ExitStack()
        for layer in wanted:
            hook = partial(self._add, self.blocks[str(layer)])
            stack.callback(getattr(layers[layer], ffn_name).register_forward_hook(hook).remove)
        return stack.close

    def _add(self, blocks: RoutedBlocks, ffn: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if self._path_BP is None:
            return output
        hidden, first = inputs[0], output[0] if isinstance(output, tuple) else output
        added = blocks(hidden, self._path_BP).to(first.dtype)
        return (first + added, *output[1:]) if isinstance(output, tuple) else first + added

    def save(self, file: str | Path) -> None:
        """Write tree, blocks and settings to one safetensors file."""
        with writing(file):
            save_file(self.state_dict(), file, metadata={SETTINGS: json.dumps(self.settings)})

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """What ``save`` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        with reading(file), safe_open(file, framework="pt") as opened:
            told = (opened.metadata() or {}).get(SETTINGS)
        if told is None:
            raise ValueError(f"{file} holds no hierarchical memory")
        memory = cls(**json.loads(told))
        memory.load_state_dict(load_file(file), assign=True)  # in the dtypes of the file
        return memory

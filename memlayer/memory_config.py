"""What the memory layers of a model are; kept in the config.json of every model that has them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memlayer.checks import check_at_least, check_choice


@dataclass
class MemoryConfig:
    """The memory layers of a model.

    Attributes:
        layers: decoder layers that get one, counted from 0.
        num_keys: half-keys n; a table has n * n slots.
        num_heads: queries per token.
        top_k: slots read per head.
        value_width: width of a value; None is the model width.
        key_width: width of a query; None is half the value width.
        mode: "replace" the feed-forward block, or "add" beside it.
        share: one table for all layers instead of one each.
    """

    layers: list[int]
    num_keys: int = 1024
    num_heads: int = 4
    top_k: int = 32
    value_width: int | None = None
    key_width: int | None = None
    mode: str = "replace"
    share: bool = True

    def __post_init__(self):
        check_choice("memory.mode", self.mode, ("replace", "add"))
        check_at_least(1, "memory", self, "num_keys", "num_heads", "value_width")

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> "MemoryConfig":
        """Read the ``memory`` section of a config.json.

        Raises:
            ValueError: a key that is not known, no ``layers``, or a value that is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(section) - known)
        if unknown:
            raise ValueError(f"memory has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        if "layers" not in section:
            raise ValueError("memory has no key 'layers'")
        return cls(**section)

"""What the memory layers of a model are; kept in the config.json of every model that has them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memlayer.checks import check_at_least, check_choice

STARTS = ("values_zero", "output_zero")
STAND_INS = ("dense", "shuffled")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_KEYS = 46340  # the largest n with n * n < 2 ** 31


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
        start: how memory beside a block says nothing until it has learned: with "values_zero" a value that is written
            is heard at once, so the model needs no healing; with "output_zero" it is heard when the output has healed.
            None is "values_zero" with mode "add"; in a block's place there is no such start.
        share: one table for all layers instead of one each.
        control: what stands in the memory's place, to be compared with it: "dense" is a gated feed-forward block of as
            many FLOPs a token as these settings say of a memory; "shuffled" is the memory with slots that follow from
            a token's position, whatever the token; None is the memory. One with nothing to look up is num_keys=1 and
            top_k=1.
        dtype: of tables, product keys, gates and outputs, whatever the decoder around them computes in. In half
            precision most steps of a learning run would be rounded away.

    Raises:
        ValueError: a value of another type or out of range.
    """

    layers: list[int]
    num_keys: int = 1024
    num_heads: int = 4
    top_k: int = 32
    value_width: int | None = None
    key_width: int | None = None
    mode: str = "replace"
    start: str | None = None
    share: bool = True
    control: str | None = None
    dtype: str = "float32"

    def __post_init__(self):
        self._check_types()
        if not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"memory.layers is {list(self.layers)}, must be one layer or more, counted from 0, each once"
            )
        check_choice("memory.mode", self.mode, ("replace", "add"))
        check_choice("memory.dtype", self.dtype, DTYPES)
        if self.control is not None:
            check_choice("memory.control", self.control, STAND_INS)
        if self.start is not None:
            check_choice("memory.start", self.start, STARTS)
            if self.mode != "add":
                raise ValueError(f"memory.start is {self.start!r}: memory in a block's place says something at once")
        elif self.mode == "add":
            self.start = STARTS[0]
        check_at_least(1, "memory", self, "num_keys", "num_heads", "top_k", "value_width")
        check_at_least(2, "memory", self, "key_width")
        if self.num_keys > MAX_KEYS:
            raise ValueError(
                f"memory.num_keys is {self.num_keys}, must be at most {MAX_KEYS}: slots are numbered in int32"
            )
        if self.top_k > self.num_keys:
            raise ValueError(f"memory.top_k is {self.top_k}, must be at most memory.num_keys = {self.num_keys}")
        if self.key_width is not None and self.key_width % 2:
            raise ValueError(f"memory.key_width is {self.key_width}, must be even: a query has two halves")

    def _check_types(self) -> None:
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence) or not all(map(_whole, self.layers)):
            raise ValueError(f"memory.layers is {self.layers!r}, must be a list of whole numbers")
        for name in ("num_keys", "num_heads", "top_k", "value_width", "key_width"):
            number = getattr(self, name)
            if not _whole(number) and not (number is None and name.endswith("width")):
                raise ValueError(f"memory.{name} is {number!r}, must be a whole number")
        if not isinstance(self.share, bool):
            raise ValueError(f"memory.share is {self.share!r}, must be true or false")

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


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)

"""The memory layer: a table of values and the layer that reads it.

A table belongs to the model, not to a layer, so several layers may read one table; layers hold it in
a plain list, because a parameter registered twice is re-initialised on loading and refused by FSDP2.

Shapes: T tokens, H heads, N slots, K slots read, V value width, D model width, R rows.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlayer.layers.product_keys import ProductKeys
from memlayer_kernels.ops import memory_lookup


class MemoryTable(nn.Embedding):
    """The values: ``num_slots`` rows of ``width`` numbers, read as weighted sums.

    It is an ``nn.Embedding``, whose gradient is dense, so that any optimizer, clipping or trainer can train it. With
    ``sparse`` set to True its gradient holds only the rows read, which RowAdamW steps and DistributedDataParallel
    knows how to reduce: whoever makes that optimizer sets it. While a sparse memory finetuner is attached, ``rows``
    and ``row_of_slot`` say which slots the backward pass may write to. While ``columns`` is set the weight holds these
    columns of all slots, and other processes the others (columns.py); its forward pass is then theirs too.

    Args:
        num_slots: N.
        width: value width V.
    """

    def __init__(self, num_slots: int, width: int):
        super().__init__(num_slots, width)
        self.register_parameter("rows", None)
        self.register_buffer("row_of_slot", None, persistent=False)
        self.columns = None  # a columns.Columns; not imported, as exported code does without

    def reset_parameters(self) -> None:
        """Values of unit expected norm (arXiv:1907.05242)."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def forward(self, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sums of values, shape (T, V)."""
        slots_TK, weights_TK = slots_TK.to(self.weight.device), weights_TK.to(self.weight.device)
        if self.columns is not None:
            return self.columns.read(slots_TK, weights_TK, self._look_up)
        return self._look_up(slots_TK, weights_TK)

    def _look_up(self, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        rows = self.rows if self.rows is None or self.columns is None else self.rows[:, self.columns.here]
        return memory_lookup(self.weight, slots_TK, weights_TK, rows, self.row_of_slot, sparse_grad=self.sparse)

    def rows_at(self, slots_R: Tensor) -> Tensor:
        """A copy of whole rows, (R, V), whatever of them is here."""
        rows = self.weight.detach()[slots_R.to(self.weight.device)]
        return rows if self.columns is None else self.columns.whole(rows)

    @torch.no_grad()
    def put_rows(self, slots_R: Tensor, rows_RV: Tensor) -> None:
        """Write whole rows, (R, V), of the table's dtype, of which what belongs here is kept."""
        rows = rows_RV if self.columns is None else self.columns.of(rows_RV)
        self.weight.index_copy_(0, slots_R.to(self.weight.device), rows.to(self.weight.device))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """torch's, which takes of a whole table what belongs here."""
        weight = state_dict.get(f"{prefix}weight")
        if self.columns is not None and weight is not None and weight.shape[1] == self.embedding_dim:
            state_dict = {**state_dict, f"{prefix}weight": self.columns.of(weight)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MemoryTables(nn.ModuleList):
    """The tables of a model, which stay the modules that its layers read."""

    def __setattr__(self, name: str, value) -> None:
        """Refuse what is put in the place of a table: an adapter's wrapper would train nothing, as layers bypass it.

        Raises:
            ValueError: it is not a table.
        """
        if isinstance(value, nn.Module) and not isinstance(value, MemoryTable):
            raise ValueError(
                f"a {type(value).__name__} cannot stand in for memory table {name}: memory layers read the table "
                "itself, so name other modules for adapters"
            )
        super().__setattr__(name, value)


class MemoryLayer(nn.Module):
    """Reads a table with product keys and gates what it read (Memory+, arXiv:2412.09764, section 3).

    ``out( read * silu(gate(x)) )``, with ``read`` the sum over heads and slots of softmax weight
    times value.

    Args:
        width: model width D.
        table: the values; n * n slots of width V.
        num_keys: half-keys n.
        num_heads: heads H.
        top_k: slots read per head K.
        key_width: width of a whole query; half the value width when None.

    Raises:
        ValueError: the table does not have ``num_keys ** 2`` slots.
    """

    keys_class = ProductKeys

    def __init__(
        self,
        width: int,
        table: MemoryTable,
        num_keys: int,
        num_heads: int = 4,
        top_k: int = 32,
        key_width: int | None = None,
    ):
        super().__init__()
        if table.num_embeddings != num_keys**2:
            raise ValueError(
                f"the table has {table.num_embeddings} slots, num_keys = {num_keys} addresses {num_keys**2}"
            )
        value_width = table.embedding_dim
        self.keys = self.keys_class(width, num_keys, num_heads, top_k, key_width or max(2, value_width // 4 * 2))
        self.gate = nn.Linear(width, value_width, bias=False)
        self.out = nn.Linear(value_width, width, bias=False)
        self._table = [table]

    @property
    def table(self) -> MemoryTable:
        """The table this layer reads; owned by the model."""
        return self._table[0]

    def silence(self, start: str) -> None:
        """Make the output zero whatever is read, in one of two ways.

        "values_zero" empties the table and makes the output projection orthogonal: a value is heard at the size that it
        is written with. "output_zero" makes the projection zero: no value is heard until it has been trained.
        """
        if start == "values_zero":
            nn.init.zeros_(self.table.weight)
            orthogonal_DV = nn.init.orthogonal_(torch.empty_like(self.out.weight, dtype=torch.float32))
            with torch.no_grad():
                self.out.weight.copy_(orthogonal_DV)  # a half-precision one could not be made
        else:
            nn.init.zeros_(self.out.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to memory output of the same shape."""
        dtype = self.gate.weight.dtype  # its own, whatever the decoder around it computes in
        hidden_TD = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        scores_THK, slots_THK = self.keys(hidden_TD)
        weights_THK = F.softmax(scores_THK, dim=-1).to(dtype)
        read_TV = self.table(slots_THK.flatten(1), weights_THK.flatten(1))
        # The table may live on another device than the layer: accelerate's device maps place them apart.
        out_TD = self.out(read_TV.to(hidden_TD) * F.silu(self.gate(hidden_TD)))
        return (out_TD if hidden.dtype == dtype else out_TD.to(hidden.dtype)).view(hidden.shape)


class FeedForwardWithMemory(nn.Module):
    """A feed-forward block with a memory layer beside it: ``ffn(x) + memory(x)``."""

    def __init__(self, ffn: nn.Module, memory: MemoryLayer):
        super().__init__()
        self.ffn, self.memory = ffn, memory

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.ffn(hidden)
        if isinstance(output, tuple):  # gpt-oss: its experts' weights come along
            return output[0] + self.memory(hidden), *output[1:]
        return output + self.memory(hidden)

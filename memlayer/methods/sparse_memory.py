"""Sparse memory finetuning: a step writes only the slots that its batch reads much and background text little.

The choice comes before the scatter. The finetuner owns one small parameter per table, ``rows``; the forward
pass reads the frozen table; once the batch's reads are counted, the top slots are chosen, ``rows`` is filled
from the table, and the backward pass sums only those slots' gradients into ``rows.grad``. No gradient, mask or
optimizer state of the table's size is ever made, and any torch optimizer, clipping, accumulation or
DistributedDataParallel sees an ordinary parameter.

Source: arXiv:2510.15103, section 4. Left out: choosing by gradient, choosing per sequence.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from memlayer.attach import Reads, memory_tables, record_reads
from memlayer.counts import SlotCounts
from memlayer.memory import MemoryTable
from memlayer.methods.open_table import OpenTable
from memlayer.methods.prepared import Prepared
from memlayer.patch import Base, MemoryPatch, product_key_fingerprints
from memlayer.patch.base import mark


class SparseMemoryFinetuner:
    """Makes the top slots of each step trainable, and nothing else.

    In any training loop::

        finetuner = SparseMemoryFinetuner(model, background, num_rows=400, idf_power=8)
        optimizer = finetuner.watch(torch.optim.SGD(finetuner.parameters(), lr=10.0))
        for batch in batches:
            finetuner.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        patch = finetuner.detach()

    With several micro-batches, or ranks, per optimizer step call ``select(micro_batches)`` before the first
    backward pass; the choice is then made over all of them. A run that saves ``state_dict()`` and the optimizer's
    between steps can go on from both, over the model that it began with.

    Args:
        model: a causal language model with memory; every parameter of it is frozen until ``detach``.
        background: counts of each table, see ``memlayer.counts``.
        num_rows: t, how many slots of a table one step may change.
        idf_power: how strongly slots that the background reads are avoided, see ``selection.tf_idf``.
        positions: which reads count: "all" that are not padding, as the paper has it, or those of the
            positions that predict the "answer" (the batch's ``answer_mask``).

    Raises:
        ValueError: an unknown position rule, a negative ``idf_power``, background counts that lack a table or
            do not fit it, or a table that has a finetuner already; the model is left as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        background: Mapping[str, SlotCounts],
        num_rows: int = 500,
        idf_power: float = 1.0,
        positions: str = "all",
    ):
        if not idf_power >= 0:
            raise ValueError(f"idf_power is {idf_power}, must be at least 0")
        if positions not in ("all", "answer"):
            raise ValueError(f"positions is {positions!r}, must be 'all' or 'answer'")
        self.model = model
        tables = memory_tables(model)
        for name, table in tables.items():
            _check_table(name, table, background, num_rows)
        self._mask_key = {"all": "attention_mask", "answer": "answer_mask"}[positions]
        self._idf_power = idf_power
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self._tables = {
            name: OpenTable(name, table, background[name], num_rows) for name, table in tables.items()
        }
        self._selected = False

    def parameters(self) -> list[nn.Parameter]:
        """The rows of each table, shape (num_rows, value width): what an optimizer steps."""
        return [t.rows for t in self._tables.values()]

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Let ``optimizer.step()`` write the rows back; its state is kept per slot. Returns the optimizer."""
        optimizer.register_step_pre_hook(lambda opt, _args, _kwargs: self._before_step(opt))
        optimizer.register_step_post_hook(lambda opt, _args, _kwargs: self._after_step(opt))
        return optimizer

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Forward pass on one batch; chooses the top slots unless ``select`` has done so for this step.

        Args:
            batch: ``input_ids``, ``attention_mask``, ``labels`` and, for answer positions, ``answer_mask``.
        """
        with self.selecting(batch):
            return self.model(**_model_inputs(batch)).loss

    @contextmanager
    def selecting(self, batch: Mapping[str, Tensor]):
        """A context around somebody else's forward pass on ``batch``; chooses the top slots at its end."""
        if self._selected:
            yield
            return
        with record_reads(self.model) as reads:
            yield
        self._choose([self._slots_read(reads, batch)])

    def select(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Choose the top slots of one optimizer step over all its micro-batches, by a forward pass on each."""
        counted = []
        with torch.no_grad(), record_reads(self.model) as reads:
            for batch in micro_batches:
                self.model(**_model_inputs(batch, with_labels=False))
                counted.append(self._slots_read(reads, batch))
        self._choose(counted)

    @property
    def selected(self) -> dict[str, Tensor]:
        """The slots this step may change, ascending, per table."""
        return {name: t.slots_R for name, t in self._tables.items()}

    def protect(self, documents: int) -> None:
        """Count the slots written since the last call as read by so many more background documents.

        Called when a fact is learned, it keeps later facts from overwriting it, and spreads what is written
        over more rows. The caller's background counts are not changed.

        Raises:
            ValueError: ``documents`` is negative.
        """
        if documents < 0:
            raise ValueError(f"protect is {documents}, must not be negative")
        for table in self._tables.values():
            table.protect(documents)

    def detach(self) -> MemoryPatch:
        """Give the model back as an ordinary one and return what was changed."""
        patch = self.patch()
        mark(self.model, patch.marks, had=True)
        for table in self._tables.values():
            table.close()
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        return patch

    def patch(self) -> MemoryPatch:
        """The rows changed so far, with their originals."""
        product_keys = product_key_fingerprints(self.model)
        tables = {name: table.patch(product_keys[name]) for name, table in self._tables.items()}
        return MemoryPatch(tables, base=Base.of(self.model))

    def state_dict(self) -> dict[str, dict]:
        """What later steps depend on, beside the model that the first one began with and the optimizer's own state.

        Of each table the rows ever selected and their originals, the optimizer's state of these slots, and the
        background as ``protect`` has left it: tensors and strings, for ``torch.save``.
        """
        product_keys = product_key_fingerprints(self.model)
        return {name: table.state_dict(product_keys[name]) for name, table in self._tables.items()}

    def load_state_dict(self, state: Mapping[str, Mapping]) -> None:
        """Go on where the finetuner that gave ``state`` was; this one has to be new, with the same settings.

        Raises:
            ValueError: the state is of other tables, or of a model that is not this one to the bit; nothing is
                changed then.
        """
        if state.keys() != self._tables.keys():
            raise ValueError(f"the state is of tables {sorted(state)}, the model has {sorted(self._tables)}")
        product_keys = product_key_fingerprints(self.model)
        for name, table in self._tables.items():
            try:
                table.check_state_dict(state[name], product_keys[name])
            except ValueError as error:
                raise ValueError(f"the state does not go with this model: {error}") from error
        for name, table in self._tables.items():
            table.load_state_dict(state[name])

    def _slots_read(self, reads: Reads, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Slots read at the positions that count; int32, as tables hold fewer than 2**31 and micro-batches add up."""
        if self._mask_key not in batch:
            raise ValueError(f"the batch has no {self._mask_key!r}, only {sorted(batch)}")
        return {name: slots.flatten().int() for name, slots in reads.slots(batch[self._mask_key]).items()}

    def _choose(self, counted: Iterable[Mapping[str, Tensor]]) -> None:
        counted = list(counted)
        for name, table in self._tables.items():
            table.choose(torch.cat([slots[name] for slots in counted]), self._idf_power)
        self._selected = True

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._selected:
            raise ValueError(
                "optimizer.step() before any batch was read: call loss(batch) or select(batches) first"
            )
        for table in self._tables.values():
            table.load_moments(optimizer.state.get(table.rows, {}))

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for table in self._tables.values():
            table.save_moments(optimizer.state.get(table.rows, {}))
            table.write()
        self._selected = False


def _model_inputs(batch: Mapping[str, Tensor], with_labels: bool = True) -> dict[str, Tensor]:
    left_out = {"answer_mask"} if with_labels else {"answer_mask", "labels"}
    return {key: value for key, value in batch.items() if key not in left_out}


def _check_table(name: str, table: MemoryTable, background: Mapping[str, SlotCounts], num_rows: int) -> None:
    """Refuse before anything is frozen, so that a refusal leaves the model as it was."""
    num_slots = table.num_embeddings
    if table.rows is not None:
        raise ValueError(f"table {name!r} has a finetuner already; detach it first")
    if name not in background:
        raise ValueError(f"no background counts of table {name!r}; there are {sorted(background)}")
    if background[name].num_slots != num_slots:
        raise ValueError(
            f"background counts of table {name!r} have {background[name].num_slots} slots, the table has {num_slots}"
        )
    if not 1 <= num_rows <= num_slots:
        raise ValueError(f"num_rows is {num_rows}, must be between 1 and the table's {num_slots} slots")


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def prepare(model: nn.Module, background: Mapping[str, SlotCounts], settings) -> Prepared:
    """Train the top slots of each step with a plain optimizer; SGD without momentum is the paper's."""
    if settings.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {settings.optimizer!r}, must be one of {sorted(OPTIMIZERS)}")
    finetuner = SparseMemoryFinetuner(
        model, background, settings.num_rows, settings.idf_power, settings.positions
    )
    optimizer = OPTIMIZERS[settings.optimizer](finetuner.parameters(), lr=settings.learning_rate)
    return Prepared(model, finetuner.watch(optimizer), finetuner.detach, finetuner)

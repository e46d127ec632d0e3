"""Sparse memory finetuning: a step writes only the slots that its batch reads much and background text little.

The choice comes before the scatter. The finetuner owns one small parameter per table, ``rows``; the forward
pass reads the frozen table; once the batch's reads are counted, the top slots are chosen, ``rows`` is filled
from the table, and the backward pass sums only those slots' gradients into ``rows.grad``. No gradient, mask or
optimizer state of the table's size is ever made, and clipping, accumulation or DistributedDataParallel see an
ordinary parameter. Its optimizer may be any in which every number steps by itself; see ``slot_steps``.

A choice belongs to one training batch. A forward pass without gradients chooses nothing; every other one chooses
anew, unless ``select`` has chosen for several; and a backward pass is refused where the rows are not its batch's.

Source: arXiv:2510.15103, section 4. Left out: choosing per sequence.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from memlayer.data.qa import MASKS
from memlayer.decoders.attach import Reads, in_backward, record_reads, refuse_sharded, unsharded_tables
from memlayer.decoders.fingerprint import product_key_fingerprints
from memlayer.layers.memory import MemoryTable
from memlayer.layers.ranks import num_ranks
from memlayer.methods.open_table import Capacity, OpenTable, Selection
from memlayer.methods.prepared import Prepared
from memlayer.methods.rate_unit import rate_of_one
from memlayer.methods.slot_gradients import recording
from memlayer.patch import Base, MemoryPatch
from memlayer.patch.base_model import mark
from memlayer.slots.counts import SlotCounts
from memlayer.slots.selection import read_by_all, read_by_each

POSITIONS = ("all", "subject", "answer")
READS = ("sum", "wordings", "minimum")
SELECT = ("tf_idf", "kl", "kl_documents", "gradient", "random")


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

    With several micro-batches per optimizer step call ``select(micro_batches)`` before the first backward pass; the
    choice is then made over all of them, and over all ranks. A run that saves ``state_dict()`` and the optimizer's
    between steps can go on from both, over the model that it began with.

    Args:
        model: a causal language model with memory; every parameter of it is frozen until ``detach``.
        background: counts of each table, see ``memlayer.slots.counts``.
        num_rows: t, how many slots of a table one step may change.
        idf_power: how strongly slots that the background reads are avoided, see ``selection.tf_idf``.
        positions: which reads count: "all" that are not padding, as the paper has it; those of the tokens that name
            the "subject" (the batch's ``subject_mask``), which all wordings of a lesson have in common; or those that
            predict the "answer" (its ``answer_mask``). A batch without ``attention_mask`` has no padding, as for the
            model.
        protect: as read by how many more background documents a slot counts for each lesson that wrote it, when
            another one chooses; 0 is the paper's rule.
        max_norm: how long the change of a row may become; a step that takes it further is shortened. None is no bound.
        reads: "sum" counts how often the batch reads a slot, as the paper has it; "wordings", how many of its sequences
            read it; "minimum", how often that one does which reads it least, so that only slots which all wordings of
            a lesson share are written.
        select: how slots are ranked. "tf_idf" is the paper's rule; "kl" and "kl_documents" are those of
            ``selection.kl``, which take no power; "gradient" puts the length of each slot's gradient in the place of
            its reads, which costs a second forward and a second backward pass; "random" is a control.
        damping: how much shorter a slot's step becomes by how often the background reads it, whatever the optimizer,
            see ``selection.step_shares``; ``protect`` counts there too. 0 is the paper's rule, full steps for all.

    Attributes:
        last_selection: per table, how many slots the latest batch read, and how many were selected; for a log.

    Raises:
        ValueError: an unknown position rule, a negative ``idf_power`` or ``damping``, background counts that lack a
            table, do not fit it, are of other product keys or hold nothing to damp by, or a table that has a finetuner
            already; the model is left as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        background: Mapping[str, SlotCounts],
        num_rows: int = 500,
        idf_power: float = 1.0,
        positions: str = "all",
        protect: int = 0,
        max_norm: float | None = None,
        reads: str = "sum",
        select: str = "tf_idf",
        damping: float = 0.0,
    ):
        if not idf_power >= 0:
            raise ValueError(f"idf_power is {idf_power}, must be at least 0")
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping is {damping}, must be a number of at least 0")
        if protect < 0:
            raise ValueError(f"protect is {protect}, must not be negative")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}, must be above 0")
        for name, given, allowed in (
            ("positions", positions, POSITIONS),
            ("reads", reads, READS),
            ("select", select, SELECT),
        ):
            if given not in allowed:
                raise ValueError(f"{name} is {given!r}, must be {' or '.join(map(repr, allowed))}")
        self.model = model
        tables, product_keys = unsharded_tables(model), product_key_fingerprints(model)
        for name, table in tables.items():
            _check_table(name, table, background, num_rows)
            background[name].check_keys(name, product_keys[name])
            if damping and not background[name].reads_N.any():
                raise ValueError(
                    f"damping is {damping}, and the background counts of table {name!r} hold no read to damp steps by: "
                    "count some text, or set damping to 0"
                )
        self._settings = {"num_rows": num_rows, "idf_power": float(idf_power), "positions": positions}
        self._settings |= {"protect": protect, "max_norm": max_norm, "reads": reads, "select": select}
        self._settings["damping"] = float(damping)
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        rules = num_rows, protect, max_norm, float(damping)
        self._tables = {name: OpenTable(name, table, background[name], *rules) for name, table in tables.items()}
        self._listening = [t.table.register_forward_hook(self._follow) for t in self._tables.values()]
        self.last_selection: dict[str, Selection] = {}
        # One object a choice: the one in force, and that of the forward pass that runs.
        self._choice: object | None = None
        self._running: object | None = None
        self._by_select, self._passes_left = False, 0

    def parameters(self) -> list[nn.Parameter]:
        """The rows of each table, shape (num_rows, value width): what an optimizer steps."""
        return [t.rows for t in self._tables.values()]

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Let ``optimizer.step()`` step the rows and write them back; their state is kept here, per slot.

        Returns:
            the optimizer.

        Raises:
            ValueError: it does not step ``parameters()``, or the step of a row depends on other rows.
        """
        for table in self._tables.values():
            table.check_optimizer(optimizer)
        set_aside: list[Tensor | None] = []

        def before(_optimizer, args, kwargs):
            if any(argument is not None for argument in (*args[1:], *kwargs.values())):
                raise ValueError("optimizer.step() takes no closure here: call loss(batch).backward() before it")
            self._step(optimizer)
            for rows in self.parameters():  # the optimizer itself leaves alone what has no gradient
                set_aside.append(rows.grad)
                rows.grad = None

        def after(_optimizer, _args, _kwargs):
            for rows in self.parameters():
                rows.grad = set_aside.pop(0)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Forward pass on one batch; chooses the top slots unless ``select`` has done so for this step.

        Args:
            batch: ``input_ids``, ``attention_mask``, ``labels`` and, for positions other than all, their mask.
        """
        with self.selecting(batch):
            return self.model(**_model_inputs(batch)).loss

    @contextmanager
    def selecting(self, batch: Mapping[str, Tensor]):
        """A context around somebody else's forward pass on ``batch``; chooses the top slots at its end.

        Without gradients (``torch.no_grad``) it is an evaluation, which chooses nothing.

        Raises:
            ValueError: gradients wait for the step of an earlier choice; several forward passes run inside; or no
                slot that was read may be selected.
        """
        if not torch.is_grad_enabled():
            yield
        elif self._passes_left:
            self._passes_left -= 1
            with self._run(self._choice):
                yield
        elif self._settings["select"] == "gradient":
            self._choose_by_gradient(batch)
            self._choice = choice = object()
            with self._run(choice):
                yield
        else:
            self._begin()
            choice = object()
            with record_reads(self.model) as reads, self._run(choice):
                yield
            if reads.passes > 1:
                raise ValueError(
                    f"{reads.passes} forward passes ran inside selecting(batch), which counts those of one batch: "
                    "call select(micro_batches) with the batch of each first"
                )
            self._choose([self._slots_read(reads, batch)])
            self._choice = choice

    def select(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Choose the top slots of one optimizer step over all its micro-batches, by a forward pass on each.

        The choice holds for as many training passes as there are micro-batches, or until the step.

        Raises:
            ValueError: gradients wait for the step of an earlier choice, or no slot that was read may be selected.
        """
        if self._settings["select"] == "gradient":
            raise ValueError(
                f"a step of {len(micro_batches)} micro-batches with select 'gradient': that takes one batch"
            )
        self._begin()
        counted = []
        with torch.no_grad(), record_reads(self.model) as reads:
            for batch in micro_batches:
                self.model(**_model_inputs(batch, with_labels=False))
                counted.append(self._slots_read(reads, batch))
        self._choose(counted)
        self._choice, self._by_select, self._passes_left = object(), True, len(micro_batches)

    @contextmanager
    def alongside(self):
        """A context around a forward pass whose loss is added to that of the batch which the rows were chosen for.

        It chooses nothing: where it reads the chosen rows, its loss moves them too.

        Raises:
            ValueError: no rows are chosen.
        """
        if self._choice is None:
            raise ValueError("no rows are chosen yet: run the batch's own forward pass before what goes beside it")
        with self._run(self._choice):
            yield

    @property
    def selected(self) -> dict[str, Tensor]:
        """The slots this step may change, ascending, per table."""
        return {name: t.slots_R for name, t in self._tables.items()}

    def whole_step(self, batch: Mapping[str, Tensor]) -> float:
        """SGD's rate for a first step that takes the batch's whole loss away, if that falls in a straight line.

        Nothing is changed and nothing stays chosen. Infinite where the loss does not fall.
        """
        loss = self.loss(batch)
        loss.backward()
        slope = sum(table.slope() for table in self._tables.values())
        for rows in self.parameters():
            rows.grad = None
        self._forget()
        return loss.item() / slope if slope else math.inf

    def begin(self, lesson: str) -> None:
        """Teach this lesson from now on, for the first time or again.

        What other lessons wrote is protected from it, by as many documents as ``protect`` says, and the patch tells
        apart what each lesson wrote. The caller's background counts are not changed; ``MemoryPatch.protect`` gives
        those for a later run over the patched model.
        """
        for table in self._tables.values():
            table.begin(lesson)

    def capacity(self) -> dict[str, Capacity]:
        """How full each table is."""
        return {name: table.capacity() for name, table in self._tables.items()}

    def detach(self) -> MemoryPatch:
        """Give the model back as an ordinary one and return what was changed."""
        patch = self.patch()
        for handle in self._listening:
            handle.remove()
        mark(self.model, patch.marks, had=True)
        for table in self._tables.values():
            table.close()
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        return patch

    def patch(self) -> MemoryPatch:
        """The rows changed so far, with their originals."""
        refuse_sharded(self.model)
        product_keys = product_key_fingerprints(self.model)
        tables = {name: table.patch(product_keys[name]) for name, table in self._tables.items()}
        return MemoryPatch(tables, base=Base.of(self.model))

    def state_dict(self) -> dict[str, dict]:
        """What later steps depend on, beside the model that the first one began with and the optimizer's own state.

        Of each table the rows ever selected and their originals, the optimizer's state of these slots, and which
        lesson wrote which: tensors and strings, for ``torch.save``.
        """
        product_keys = product_key_fingerprints(self.model)
        tables = {name: table.state_dict(product_keys[name]) for name, table in self._tables.items()}
        return {"settings": dict(self._settings), "tables": tables}

    def load_state_dict(self, state: Mapping[str, Mapping]) -> None:
        """Go on where the finetuner that gave ``state`` was; this one has to be new, with the same settings.

        Raises:
            ValueError: the state is of other settings, another background or other tables, or of a model that is not
                this one to the bit; nothing is changed then.
        """
        if state.keys() != {"settings", "tables"}:
            raise ValueError(f"a finetuner's state has settings and tables, this one has {sorted(state)}")
        for key, ours in self._settings.items():
            if (theirs := state["settings"].get(key)) != ours:
                raise ValueError(f"the state is of a finetuner with {key} {theirs!r}, this one has {ours!r}")
        tables = state["tables"]
        if tables.keys() != self._tables.keys():
            raise ValueError(f"the state is of tables {sorted(tables)}, the model has {sorted(self._tables)}")
        product_keys = product_key_fingerprints(self.model)
        for name, table in self._tables.items():
            try:
                table.check_state_dict(tables[name], product_keys[name])
            except ValueError as error:
                raise ValueError(f"the state does not go with this model: {error}") from error
        for name, table in self._tables.items():
            table.load_state_dict(tables[name])

    def _slots_read(self, reads: Reads, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Slots read at the positions that count; int32, as tables hold fewer than 2**31 and micro-batches add up."""
        mask = self._mask(batch)
        counted, sequence_P = {}, mask.bool().nonzero()[:, 0]
        for name, slots_PK in reads.slots(mask).items():
            sequence_of_read_P = sequence_P.repeat(len(slots_PK) // max(1, len(sequence_P)))
            if self._settings["reads"] == "wordings":
                slots_PK = read_by_each(slots_PK, sequence_of_read_P)
            elif self._settings["reads"] == "minimum":
                slots_PK = read_by_all(slots_PK, sequence_of_read_P, len(mask))
            counted[name] = slots_PK.flatten().int()
        return counted

    def _mask(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The positions whose reads count."""
        if (positions := self._settings["positions"]) != "all":
            if f"{positions}_mask" not in batch:
                raise ValueError(f"the batch has no '{positions}_mask', only {sorted(batch)}")
            return batch[f"{positions}_mask"]
        if "attention_mask" in batch:
            return batch["attention_mask"]
        embedded = "input_ids" not in batch
        return torch.ones_like(batch["inputs_embeds"][..., 0] if embedded else batch["input_ids"], dtype=torch.bool)

    def _begin(self) -> None:
        """Drop a choice that no step followed: an evaluation's, a skipped step's, that of a batch left out.

        Raises:
            ValueError: its gradients are there and finite, so a step may still follow; or FSDP has sharded the model.
        """
        refuse_sharded(self.model)
        if self._choice is not None:
            gradients = [rows.grad for rows in self.parameters() if rows.grad is not None]
            if all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients):
                raise ValueError(
                    "a training pass while gradients of another batch wait for their step would train rows that were "
                    "chosen for one of them: call select(micro_batches) before the first backward pass of a step, "
                    "optimizer.zero_grad() after a step that is left out, and torch.no_grad() around an evaluation"
                )
        self._forget()

    def _forget(self) -> None:
        for table in self._tables.values():
            table.drop()
        self._choice, self._by_select, self._passes_left = None, False, 0

    @contextmanager
    def _run(self, choice: object):
        self._running = choice
        try:
            yield
        finally:
            self._running = None

    def _follow(self, _table: MemoryTable, _inputs: tuple, read_TV: Tensor) -> None:
        """Have the backward pass of this read see that the rows are those of its batch."""
        if torch.compiler.is_compiling() or in_backward() or not read_TV.requires_grad:
            return
        choice = self._choice if self._running is None and self._by_select else self._running
        read_TV.register_hook(lambda _grad: self._check(choice))

    def _check(self, choice: object | None) -> None:
        if choice is None or choice is not self._choice:
            raise ValueError(
                "the rows are not chosen for the batch of this backward pass: run its forward pass by loss(batch) or "
                "inside selecting(batch), and with several batches a step call select(micro_batches) before them"
            )

    def _choose(self, counted: Iterable[Mapping[str, Tensor]]) -> None:
        counted = list(counted)
        parts = len(counted) * num_ranks()
        if parts > 1 and self._settings["reads"] == "minimum":
            raise ValueError(f"a step of {parts} micro-batches with reads 'minimum': that takes a batch in one part")
        for name, table in self._tables.items():
            slots = torch.cat([slots[name] for slots in counted])
            table.choose(slots, self._settings["select"], self._settings["idf_power"])
        self._look_at_choice()

    def _choose_by_gradient(self, batch: Mapping[str, Tensor]) -> None:
        """Choose by how much the loss wants each slot to move, which one more pass over the batch tells."""
        if (ranks := num_ranks()) > 1:
            raise ValueError(
                f"select 'gradient' in {ranks} processes: each would choose by its own part of the batch, so train in "
                "one"
            )
        self._begin()
        self._choice = object()  # no row is open yet, so nothing is trained
        with recording({name: t.table for name, t in self._tables.items()}) as found, self._run(self._choice):
            norms = found.norms(self.model(**_model_inputs(batch)).loss, self._mask(batch).bool().flatten())
        for name, table in self._tables.items():
            table.choose_by_gradient(*norms[name], self._settings["idf_power"])
        self._look_at_choice()

    def _look_at_choice(self) -> None:
        """Refuse a step that would learn nothing, and say where one has little to choose among."""
        self.last_selection = {name: table.selection for name, table in self._tables.items()}
        if not any(found.selected for found in self.last_selection.values()):
            self._refuse_nothing()
        for table in self._tables.values():
            table.warn_of_few()

    def _refuse_nothing(self) -> None:
        name, found = next(iter(self.last_selection.items()))
        background = self._tables[name].background
        if not found.read:
            why = "no position of the batch counts: look at its attention_mask, subject_mask or answer_mask"
            if self._settings["reads"] == "minimum":
                why = "its sequences share no slot: give them fewer wordings, or take reads 'sum'"
        elif not background.num_documents:
            why = "the background counts hold no documents: count some, or set idf_power to 0"
        else:
            why = (
                f"all {found.read} slots that the batch reads of table {name!r} have an idf of 0, since each of the "
                f"{background.num_documents} background documents ({background.document}) reads them: count shorter "
                "documents, or set idf_power to 0"
            )
        raise ValueError(f"no slot is selected, so nothing would be learned; {why}")

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._choice is None:
            raise ValueError("optimizer.step() before any batch was read: call loss(batch) or select(batches) first")
        if all(rows.grad is None for rows in self.parameters()):  # no backward pass: the step is left out
            return self._forget()
        for table in self._tables.values():
            table.step(optimizer)
        self._forget()


def _model_inputs(batch: Mapping[str, Tensor], with_labels: bool = True) -> dict[str, Tensor]:
    left_out = MASKS if with_labels else (*MASKS, "labels")
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


def prepare(model: nn.Module, background: Mapping[str, SlotCounts], settings, lessons=()) -> Prepared:
    """Train the top slots of each step with a plain optimizer; SGD without momentum is the paper's."""
    if settings.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {settings.optimizer!r}, must be one of {sorted(OPTIMIZERS)}")
    finetuner = SparseMemoryFinetuner(
        model,
        background,
        settings.num_rows,
        settings.idf_power,
        settings.positions,
        settings.protect,
        settings.max_norm,
        settings.reads,
        settings.select,
        settings.damping,
    )
    rate, found = settings.learning_rate, {}
    if settings.rate_unit == "lessons":
        found["rate_of_one"] = rate_of_one(finetuner, lessons)
        rate *= found["rate_of_one"]
    optimizer = OPTIMIZERS[settings.optimizer](finetuner.parameters(), lr=rate)
    return Prepared(model, finetuner.watch(optimizer), finetuner.detach, finetuner, found=found)

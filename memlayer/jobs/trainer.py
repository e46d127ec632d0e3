"""A thin subclass of transformers.Trainer for models with memory: optimizer groups by name, tables with their own rule,
and the choice of top slots between forward and backward.

Everything else (accumulation, clipping, schedules, checkpoints, resume, logging, accelerate) is the
Trainer's own.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from math import prod
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from memlayer.data.qa import IGNORED, MASKS
from memlayer.decoders.classes import whole_state_dict
from memlayer.decoders.split import average_table_gradients, copy_tables_from_first, leave_to_us
from memlayer.evaluation.kept_logits import can_keep_logits, kept_logits
from memlayer.files import reading
from memlayer.jobs.split_checkpoints import state_here, whole_state
from memlayer.jobs.stepwise_trainer import StepwiseTrainer
from memlayer.layers.memory import MemoryTable
from memlayer.layers.optimizer import RowAdamW
from memlayer.layers.ranks import Ranks, num_ranks
from memlayer.machine import describe
from memlayer.methods.prepared import Finetuner
from memlayer.methods.terms import Term

FINETUNER = "finetuner.pt"  # in a checkpoint: what a sparse memory finetuner has written so far


class _TermsAroundTheStep(TrainerCallback):
    """Shows the terms what the optimizer is about to step, and what it has stepped."""

    def __init__(self, terms: Sequence[Term]):
        self.terms = terms

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for term in self.terms:
            term.after_backward(_stepped(optimizer))

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for term in self.terms:
            term.after_step(_stepped(optimizer))


def _stepped(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class MemoryTrainer(StepwiseTrainer):
    """The Trainer for models with memory.

    Args:
        table_learning_rate: constant learning rate of the tables when the Trainer makes the optimizer.
        finetuner: what chooses the rows of each step; its optimizer is passed as ``optimizers``.
        lessons: the lesson of each step, which a finetuner is told.
        terms: what each step heeds beside its batch.
        skip_below: a step whose loss is below is left out, and changes nothing.
        **kwargs: transformers.Trainer's own arguments.

    Raises:
        ValueError: the best of several models is asked for while a finetuner writes into one, or steps are to be left
            out that several processes or micro-batches share.
    """

    def __init__(
        self,
        *args,
        table_learning_rate: float = 1e-3,
        finetuner: Finetuner | None = None,
        lessons: Sequence[str] = (),
        skip_below: float | None = None,
        terms: Sequence[Term] = (),
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._terms, self._examples, self._tokens = terms, 0, torch.zeros((), dtype=torch.int64)
        if terms:
            self.add_callback(_TermsAroundTheStep(terms))
        self._lessons, self._skip_below, self.steps_left_out = lessons, skip_below, 0
        if skip_below is not None and self.args.world_size * self.args.gradient_accumulation_steps > 1:
            raise ValueError(
                "learn.skip_below needs one process and trainer.gradient_accumulation_steps=1: it looks at the loss of "
                "a whole step"
            )
        self._makes_optimizer = self.optimizer is None
        self.table_learning_rate, self.finetuner = table_learning_rate, finetuner
        decoder = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self._forward = decoder.forward
        self._ranks: Ranks | None = None  # of several processes: those whose gradients of rows are gathered
        if finetuner is not None and self.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end has no meaning while facts are taught in order: the last step knows all of them"
            )

    def train(self, *args, **kwargs):
        """The Trainer's, after one line that says what of the machine is used.

        Tables that are stepped row by row have sparse gradients meanwhile.
        """
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            print(describe(self.args))
        try:
            return super().train(*args, **kwargs)
        finally:
            self._set_sparse(False)
            if num_ranks() > 1:
                leave_to_us(self.model, self._split())

    def _set_sparse(self, sparse: bool) -> None:
        """Whether the tables that an optimizer made here steps get sparse gradients."""
        groups = getattr(self.optimizer, "param_groups", ()) if self._makes_optimizer else ()
        stepped = {id(p) for group in groups if group.get("name") == "table" for p in group["params"]}
        for table in self._tables() if stepped else ():
            if id(table.weight) in stepped:
                table.sparse = sparse

    def _tables(self) -> list[MemoryTable]:
        """All tables; a control of dense blocks has none."""
        return [module for module in self.model.modules() if isinstance(module, MemoryTable)]

    def _split(self) -> list[MemoryTable]:
        """The tables that this process has some columns of."""
        return [table for table in self._tables() if table.columns is not None]

    def _take_tables_from_reducer(self) -> None:
        """Reduce the gradients of tables ourselves where they hold only the rows read: NCCL cannot."""
        by_rows = [t for t in self._tables() if t.sparse and t.weight.requires_grad]
        self._ranks = Ranks() if by_rows else None
        whole = [table for table in by_rows if table.columns is None]
        copy_tables_from_first(whole, self._ranks)
        ours = [*whole, *self._split()]
        leave_to_us(self.model, ours)
        taken = {id(table.weight) for table in ours}
        if all(id(p) in taken for p in self.model.parameters() if p.requires_grad):
            # DistributedDataParallel refuses a model of which it has nothing to reduce.
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The Trainer's; the gradients of tables are gathered once all micro-batches of a step have added theirs."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._ranks is not None and self.accelerator.sync_gradients:
            average_table_gradients(self.model, self._ranks)
        return loss

    def create_optimizer(self, model=None):
        """AdamW in three groups: decayed matrices, the rest, and tables (constant rate, no decay) where there are any.

        The tables come last, for the rate that the Trainer logs is the first group's.
        """
        if self.optimizer is None:
            model = model or self.model
            tables = {id(module.weight) for module in model.modules() if isinstance(module, MemoryTable)}
            groups = {"table": [], "decay": [], "no_decay": []}
            for parameter in model.parameters():
                if parameter.requires_grad:
                    kind = "table" if id(parameter) in tables else "decay" if parameter.ndim > 1 else "no_decay"
                    groups[kind].append(parameter)
            args = self.args
            of_table = {"lr": self.table_learning_rate, "weight_decay": 0.0, "name": "table"}
            self.optimizer = RowAdamW(
                [
                    {"params": groups["decay"], "weight_decay": args.weight_decay, "name": "decay"},
                    {"params": groups["no_decay"], "weight_decay": 0.0, "name": "no_decay"},
                    *([{"params": groups["table"], **of_table}] if tables else []),
                ],
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
        self._set_sparse(True)
        if num_ranks() > 1:
            self._take_tables_from_reducer()
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The Trainer's schedule for every group but the tables, whose rate is constant.

        Raises:
            ValueError: the schedule is of a kind that moves all groups alike.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        groups = (optimizer or self.optimizer).param_groups
        is_table = [group.get("name") == "table" for group in groups]
        if not any(is_table):
            return scheduler
        if isinstance(scheduler, ReduceLROnPlateau):
            floors = zip(is_table, groups, scheduler.min_lrs, strict=True)
            scheduler.min_lrs = [group["lr"] if table else floor for table, group, floor in floors]
        elif isinstance(scheduler, LambdaLR):
            schedule = scheduler.lr_lambdas[0]
            rates: list[Callable] = [_constant if table else schedule for table in is_table]
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rates)
        else:
            raise ValueError(
                f"lr_scheduler_type {self.args.lr_scheduler_type.value!r} moves the rate of the tables too, "
                "which is constant: choose another"
            )
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the micro-batches of one optimizer step; with several, choose the top slots over all of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for term in self._terms:
            term.step = self.state.global_step
        if self.finetuner is not None and batches and self._lessons:
            self.finetuner.begin(self._lessons[self.state.global_step])
        if self.finetuner is not None and len(batches) > 1:
            self.finetuner.select([self._prepare_inputs(batch) for batch in batches])
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The Trainer's loss; with a finetuner, the top slots are chosen at the end of the forward pass."""
        counted = dict(inputs)
        if model.training and "attention_mask" in inputs:
            self._examples += len(inputs["input_ids"])
            self._tokens = self._tokens + inputs["attention_mask"].sum()  # looked at when all is done: no waiting
        for mask in MASKS:
            inputs.pop(mask, None)
        if not return_outputs:
            self._leave_out_prompts(inputs)
        kwargs = {"return_outputs": True, "num_items_in_batch": num_items_in_batch}
        with nullcontext() if self.finetuner is None else self.finetuner.selecting(counted):
            loss, outputs = super().compute_loss(model, inputs, **kwargs)
        if return_outputs or not loss.requires_grad:
            return (loss, outputs) if return_outputs else loss
        if self._is_learned(loss):
            self.steps_left_out += 1
            return loss.detach().requires_grad_()  # its backward pass reaches no parameter
        if not self._terms:
            return loss
        of_the_lesson = prod(term.lesson_weight for term in self._terms) * loss
        return of_the_lesson + self._of_terms(model, inputs, outputs.logits, num_items_in_batch)

    def shown(self) -> dict[str, int]:
        """How many examples and tokens this process's model was shown in training, those of the terms included."""
        return {
            "examples": self._examples + sum(term.examples for term in self._terms),
            "tokens": int(self._tokens) + sum(term.tokens for term in self._terms),
        }

    def _is_learned(self, loss: Tensor) -> bool:
        return self._skip_below is not None and loss.item() < self._skip_below

    def _of_terms(self, model: nn.Module, inputs: dict, logits: Tensor, num_items_in_batch) -> Tensor | float:
        """What the terms add to the loss of one micro-batch, divided as the Trainer divides that."""
        with nullcontext() if self.finetuner is None else self.finetuner.alongside():
            added = [term.loss(model, inputs, logits) for term in self._terms]
        scaled_already = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = self.current_gradient_accumulation_steps if scaled_already else 1
        return sum(each for each in added if each is not None) / parts

    def _leave_out_prompts(self, inputs: dict) -> None:
        """Have no logits computed for the positions before the first that a label of the batch asks for."""
        if inputs.get("labels") is None or not can_keep_logits(self._forward):
            return
        asked = (inputs["labels"] != IGNORED).any(0).nonzero()
        # A label is predicted by the position before it.
        first = max(0, int(asked[0]) - 1) if len(asked) else 0
        if first:
            labels_BL = inputs["labels"]
            inputs |= kept_logits(self._forward, first, labels_BL.shape[1], labels_BL.device)
            inputs["labels"] = labels_BL[:, first:]

    def log(self, logs, *args, **kwargs):
        """The Trainer's; with a finetuner, also what the latest choice was made among and how full the tables are."""
        if self.finetuner is not None and "loss" in logs:
            for table, found in self.finetuner.last_selection.items():
                logs |= {f"{table}.slots_{key}": number for key, number in vars(found).items()}
            for table, full in self.finetuner.capacity().items():
                logs |= {f"{table}.slots_{key}": getattr(full, key) for key in ("written", "shared", "free")}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        """The Trainer's; of a finetuner's run a checkpoint holds what was written, not the whole model again.

        Every process takes part where tables are split; what is written is what one process would write.
        """
        if self.finetuner is not None and _internal_call:
            state = self.finetuner.state_dict() if self.args.should_save or self._split() else None
            if self.args.should_save:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                torch.save(state, Path(output_dir) / FINETUNER)
        elif self._split():
            if (state := whole_state_dict(self.model)) is not None:
                self._save(output_dir, state_dict=state)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self._split():
            return super()._save_optimizer_and_scheduler(output_dir)
        if (state := whole_state(self.optimizer, self.model)) is not None:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not self._split():
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer, scheduler = (Path(checkpoint) / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME))
        with reading(optimizer):  # mapped: moments of the whole table need not be in memory
            state = torch.load(optimizer, map_location="cpu", weights_only=True, mmap=True)
        self.optimizer.load_state_dict(state_here(state, self.optimizer, self.model))
        with reading(scheduler):
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.finetuner is not None:
            with reading(path := Path(resume_from_checkpoint) / FINETUNER):
                state = torch.load(path, weights_only=True)
            self.finetuner.load_state_dict(state)
        elif isinstance(self.model, PreTrainedModel):
            restore(self.model, resume_from_checkpoint)
        else:  # wrapped by peft, whose adapters the Trainer knows
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _clip_grad_norm(self, model):
        """Clip the dense gradients; a table's sparse gradient is left to its own optimizer rule."""
        return self.accelerator.clip_grad_norm_(self._dense(), self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:
            grad_norm = self.accelerator.clip_grad_norm_(self._dense(), float("inf"))
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _dense(self) -> list[nn.Parameter]:
        return [p for p in _stepped(self.optimizer) if p.grad is not None and not p.grad.is_sparse]


@torch.no_grad()
def restore(model: PreTrainedModel, folder: str | Path) -> None:
    """Give a model the weights that one of its kind saved, in one file or in shards, under whatever names.

    Raises:
        ValueError: the folder lacks some of them, or holds others.
    """
    saved = type(model).from_pretrained(folder, config=deepcopy(model.config), dtype="auto")
    model.load_state_dict(saved.state_dict())


def _constant(_step: int) -> float:
    return 1.0

"""A thin subclass of transformers.Trainer: optimizer groups by name, tables with their own rule, and the
choice of top slots between forward and backward.

Everything else (accumulation, clipping, schedules, checkpoints, resume, logging, accelerate) is the
Trainer's own.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from memlayer.attach import memory_tables
from memlayer.decoders import MemoryDecoder
from memlayer.machine import describe
from memlayer.methods.sparse_memory import SparseMemoryFinetuner
from memlayer.modeling import check_saved
from memlayer.optimizer import RowAdamW

FINETUNER = "finetuner.pt"  # in a checkpoint: what a sparse memory finetuner has written so far


class MemoryTrainer(Trainer):
    """transformers.Trainer for models with memory.

    Args:
        table_learning_rate: constant learning rate of the tables when the Trainer makes the optimizer.
        finetuner: a sparse memory finetuner whose optimizer is passed as ``optimizers``.
        **kwargs: transformers.Trainer's own arguments.
    """

    def __init__(
        self,
        *args,
        table_learning_rate: float = 1e-3,
        finetuner: SparseMemoryFinetuner | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._makes_optimizer = self.optimizer is None
        self.table_learning_rate, self.finetuner = table_learning_rate, finetuner

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

    def _set_sparse(self, sparse: bool) -> None:
        """Whether the tables that an optimizer made here steps get sparse gradients."""
        groups = getattr(self.optimizer, "param_groups", ()) if self._makes_optimizer else ()
        stepped = {id(p) for group in groups if group.get("name") == "table" for p in group["params"]}
        for table in memory_tables(self.model).values() if stepped else ():
            if id(table.weight) in stepped:
                table.sparse = sparse

    def create_optimizer(self, model=None):
        """AdamW in three groups: tables (constant rate, no decay), decayed matrices, the rest."""
        if self.optimizer is None:
            model = model or self.model
            tables = {id(t.weight) for t in memory_tables(model).values()}
            groups = {"table": [], "decay": [], "no_decay": []}
            for parameter in model.parameters():
                if parameter.requires_grad:
                    kind = (
                        "table" if id(parameter) in tables else "decay" if parameter.ndim > 1 else "no_decay"
                    )
                    groups[kind].append(parameter)
            args = self.args
            self.optimizer = RowAdamW(
                [
                    {
                        "params": groups["table"],
                        "lr": self.table_learning_rate,
                        "weight_decay": 0.0,
                        "name": "table",
                    },
                    {"params": groups["decay"], "weight_decay": args.weight_decay, "name": "decay"},
                    {"params": groups["no_decay"], "weight_decay": 0.0, "name": "no_decay"},
                ],
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
        self._set_sparse(True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The Trainer's schedule for every group but the tables, whose rate is constant."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        if any(group.get("name") == "table" for group in optimizer.param_groups):
            schedule = scheduler.lr_lambdas[0]
            rates: list[Callable] = [
                _constant if group.get("name") == "table" else schedule for group in optimizer.param_groups
            ]
            self.lr_scheduler = LambdaLR(optimizer, rates)
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the micro-batches of one optimizer step; with several, choose the top slots over all of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.finetuner is not None and len(batches) > 1:
            self.finetuner.select([self._prepare_inputs(batch) for batch in batches])
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The Trainer's loss; with a finetuner, the top slots are chosen at the end of the forward pass."""
        counted = dict(inputs)
        inputs.pop("answer_mask", None)
        kwargs = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if self.finetuner is None:
            return super().compute_loss(model, inputs, **kwargs)
        with self.finetuner.selecting(counted):
            return super().compute_loss(model, inputs, **kwargs)

    def log(self, logs, *args, **kwargs):
        """The Trainer's; with a finetuner, also what the latest choice was made among."""
        if self.finetuner is not None and "loss" in logs:
            for table, found in self.finetuner.last_selection.items():
                logs |= {f"{table}.slots_{key}": number for key, number in vars(found).items()}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        """The Trainer's; of a finetuner's run a checkpoint holds what was written, not the whole model again."""
        if self.finetuner is None or not _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(self.finetuner.state_dict(), Path(output_dir) / FINETUNER)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.finetuner is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            model = model or self.model
            if isinstance(model, MemoryDecoder):  # not an adapter's wrapper, whose checkpoints hold the adapter alone
                check_saved(model, resume_from_checkpoint)
        else:
            self.finetuner.load_state_dict(torch.load(Path(resume_from_checkpoint) / FINETUNER, weights_only=True))

    def _clip_grad_norm(self, model):
        """Clip the dense gradients; a table's sparse gradient is left to its own optimizer rule."""
        return self.accelerator.clip_grad_norm_(_dense(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:
            grad_norm = self.accelerator.clip_grad_norm_(_dense(model), float("inf"))
        return super()._get_grad_norm(model, grad_norm=grad_norm)


def _dense(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]


def _constant(_step: int) -> float:
    return 1.0

"""transformers.Trainer whose end is never a surprise."""

import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from memlayer.files import writing
from memlayer.jobs.checkpoints import damage_of, newest_checkpoint

ORDER = "order_state.pth"  # in a checkpoint: what the order of its epoch was drawn from


class _BestModelIsHere(TrainerCallback):
    """The Trainer forgets a best checkpoint that is not where it was: the folder of the run may have another name."""

    def __init__(self, best: Path):
        self.best = best

    def on_train_begin(self, args, state, control, **kwargs):
        state.best_model_checkpoint = str(self.best)


def _best_checkpoint(args, state: TrainerState | None) -> Path | None:
    if not (args.load_best_model_at_end and state and state.best_model_checkpoint):
        return None
    best = Path(args.output_dir) / Path(state.best_model_checkpoint).name
    if damage := damage_of(best) if best.is_dir() else "it is gone":
        raise ValueError(f"{best} held the best model so far, and {damage}: delete {args.output_dir} and start anew")
    return best


class RedrawnSampler(Sampler):
    """Draws its order as another sampler does, from torch's own random numbers, and can draw the same order again.

    Args:
        sampler: of the order.

    Attributes:
        drawn_from: the state of the random numbers when the latest order was drawn.
        draw_from: the state to draw the next one from; None leaves it as it is.
    """

    def __init__(self, sampler: Sampler):
        self._sampler = sampler
        self.drawn_from: Tensor | None = None
        self.draw_from: Tensor | None = None

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        if self.draw_from is not None:
            torch.set_rng_state(self.draw_from)
        self.draw_from, self.drawn_from = None, torch.get_rng_state()
        return iter(self._sampler)


class StepwiseTrainer(Trainer):
    """transformers.Trainer that stops where going on is useless, and says where it stopped.

    It stops at the first loss that is no number, leaves no half-written checkpoint, and ends with the same model
    whether it trained in one go, went on from a checkpoint or had nothing left to do.
    """

    _goes_on_from: Path | None = None
    _order: RedrawnSampler | None = None

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the last step, from a checkpoint of this run where there is one.

        Raises:
            FloatingPointError: the loss is no finite number.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
        best = _best_checkpoint(self.args, state)
        if state is not None and state.global_step >= state.max_steps:  # the Trainer would take a step more
            self.state = state
            self._load_from_checkpoint(str(best or checkpoint))
            return
        if best is not None:
            self.add_callback(_BestModelIsHere(best))
        self._goes_on_from = checkpoint
        try:
            self.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except KeyboardInterrupt as stop:
            stop.add_note(self._where_it_stopped())
            raise

    def train(self, *args, **kwargs):
        """The Trainer's, also after an evaluation.

        accelerate (1.15) marks what an evaluation ran as prepared, and would then leave the model out of
        DistributedDataParallel: several processes would train without a word to each other.
        """
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        """The Trainer's; the one by length draws an epoch's order again for a run that goes on in the middle of it.

        Raises:
            ValueError: the checkpoint does not say what its epoch's order was drawn from.
        """
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            self._order = sampler = RedrawnSampler(sampler)
            if self._goes_on_from is not None:
                if not (path := self._goes_on_from / ORDER).is_file():
                    raise ValueError(f"{path} is missing, an older version wrote this checkpoint: delete its folder")
                sampler.draw_from = torch.load(path, weights_only=True)
        return sampler

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self._order is not None and self.args.should_save:  # all processes draw the same order
            torch.save(self._order.drawn_from, Path(output_dir) / ORDER)

    def _load_rng_state(self, checkpoint):
        """The Trainer's. It comes before the order of a new epoch is drawn, and after one that a run goes on in."""
        super()._load_rng_state(checkpoint)
        if self._order is not None:
            self._order.draw_from = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The Trainer's; looking at every loss waits for the device no longer than the Trainer's own filter would."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.state.global_step + 1}")
        return loss

    def floating_point_ops(self, inputs):
        """The Trainer's, which counts the model's parameters anew at every step."""
        return 6 * inputs[self.model.main_input_name].numel() * self._num_parameters

    @cached_property
    def _num_parameters(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save and folder.is_dir() and damage_of(folder):
                shutil.rmtree(folder)
            raise

    def _where_it_stopped(self) -> str:
        newest = newest_checkpoint(self.args.output_dir)
        goes_on = f"goes on from {newest.name}" if newest else "starts anew, as no checkpoint was saved"
        return f"stopped at step {self.state.global_step} of {self.state.max_steps}; the same command {goes_on}"


def train_to_end(trainer: StepwiseTrainer, checkpoint: Path | None, rate: str) -> None:
    """Train to the last step, from a checkpoint of this run where there is one.

    Args:
        rate: the setting that too large a loss may come from, with its value.

    Raises:
        ValueError: the loss is no finite number.
    """
    try:
        trainer.train_from(checkpoint)
    except FloatingPointError as error:
        if trainer.state.global_step:
            cause = f"a {rate} may be too high"
        else:
            cause = "no step was taken before it, so the model or the precision it is computed in is at fault"
        raise ValueError(f"{error}, nothing is written: {cause}") from error

"""The Trainer for a stream of text: it reads its own share, keeps its place, and says how fast it goes."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from memlayer.data.packing import Batches, Packing, stack
from memlayer.data.qa import IGNORED
from memlayer.files import write_file
from memlayer.jobs.throughput import Clock, flops_per_token, matmul_rate, peak_memory
from memlayer.jobs.trainer import MemoryTrainer

SEARCHING = 0.01  # of the time of training: what the search for its ceiling may cost
PLACE = "stream-{rank}.json"  # in a checkpoint: where each process stands in the text


class TextTrainer(MemoryTrainer):
    """MemoryTrainer on windows of a stream, for models with memory and without.

    Args:
        packing: what the windows are made of.
        validation: windows to measure the loss on.
        **kwargs: MemoryTrainer's.
    """

    def __init__(self, *args, packing: Packing, validation: Sequence[dict[str, Tensor]], **kwargs):
        super().__init__(*args, eval_dataset=validation, data_collator=stack, **kwargs)
        told = self.args
        self._batches = Batches(
            packing, told.per_device_train_batch_size, told.process_index, told.world_size, told.dataloader_num_workers
        )
        self._length, self._clock = packing.length, Clock()
        asked = sum(int((each["labels"][1:] != IGNORED).sum()) for each in validation)
        self._asked_per_window = asked / len(validation)
        self._flops_per_token, self._ceiling = flops_per_token(self.model, packing.length), 0.0
        self._steps, self._seconds, self._waited, self._spent = 0, 0.0, 0.0, 0.0
        self._find_ceiling()

    @property
    def tokens_of_a_step(self) -> int:
        """Over all processes and micro-batches."""
        windows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return windows * self._length

    def told(self) -> dict[str, dict[str, float]]:
        """What all processes have read of each source: tokens, and how often they came to its end."""
        of_processes = gather_object([self._batches.told()])
        return {
            name: {
                "tokens": sum(each[name]["tokens"] for each in of_processes),
                "passes": sum(each[name]["passes"] for each in of_processes) / len(of_processes),
            }
            for name in of_processes[0]
        }

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the last step, from a checkpoint of this run and its place in the text where there is one."""
        if checkpoint is not None:
            place = checkpoint / PLACE.format(rank=self.args.process_index)
            if not place.is_file():
                raise ValueError(
                    f"{checkpoint} does not say where process {self.args.process_index + 1} stood: start anew"
                )
            self._batches.load_state(json.loads(place.read_text(encoding="utf-8")))
        super().train_from(checkpoint)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process's share, which nothing may shard or skip again."""
        args = self.args
        workers = {}
        if args.dataloader_num_workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or each worker warns that it is forked
            workers = {
                "prefetch_factor": args.dataloader_prefetch_factor,
                "persistent_workers": args.dataloader_persistent_workers,
                "multiprocessing_context": args.dataloader_multiprocessing_context,
            }
        # Without a generator of its own, beginning to read draws from the one that dropout draws from.
        own = torch.Generator().manual_seed(args.seed)
        return DataLoader(
            self._batches,
            batch_size=None,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            generator=own,
            **workers,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, their place in the text noted."""
        self._clock.start()
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._clock.count(waited=time.perf_counter() - start)
        return [self._batches.note(batch) for batch in batches], num_items

    def prediction_step(self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys=None) -> tuple:
        """The loss of a batch, weighed so that the Trainer's mean over windows is the mean over tokens.

        Among processes that do not get equally many windows it is that within a part of a window.
        """
        inputs = self._prepare_inputs(inputs)
        asked = (inputs["labels"][:, 1:] != IGNORED).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs).loss
        return loss * asked / (len(inputs["labels"]) * self._asked_per_window), None, None

    def evaluate(self, *args, **kwargs):
        """The Trainer's, on time of its own."""
        with self._aside():
            return super().evaluate(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        """The Trainer's, and how fast the training went since the last time."""
        if "loss" in logs:
            logs |= self._pace()
        super().log(logs, *args, **kwargs)

    def _pace(self) -> dict[str, float]:
        with self._aside():
            self._find_ceiling()
        steps, seconds, waited = self._clock.lap()
        self._steps, self._seconds, self._waited = self._steps + steps, self._seconds + seconds, self._waited + waited
        tokens = self.state.global_step * self.tokens_of_a_step
        memory = {"peak_memory_gb": peak_memory(self.args.device) / 2**30}
        return {"tokens": tokens} | self._shares(steps, seconds, waited) | memory

    def _shares(self, steps: int, seconds: float, waited: float) -> dict[str, float]:
        rate = steps * self.tokens_of_a_step / seconds
        return {
            "tokens_per_second": rate,
            "flop_share": rate * self._flops_per_token / (self._ceiling * self.args.world_size),
            "waiting_for_text": waited / seconds,
        }

    def _find_ceiling(self) -> None:
        """Look whether the machine can do more than it was seen to do, where that has cost little so far."""
        if self._spent > SEARCHING * self._seconds:
            return
        start = time.perf_counter()
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        self._ceiling = max(self._ceiling, matmul_rate(self.args.device, dtype))
        self._spent += time.perf_counter() - start

    def speed(self) -> dict[str, float]:
        """How fast this process trained since it was started, as ``throughput.py`` has it, and what it took."""
        rates = {"flops_per_token": self._flops_per_token, "matmul_flops_per_second": self._ceiling}
        rates |= {"peak_memory": peak_memory(self.args.device), "seconds": self._seconds, "steps": self._steps}
        return rates | (self._shares(self._steps, self._seconds, self._waited) if self._steps else {})

    @contextmanager
    def _aside(self) -> Iterator[None]:
        ran = self._clock.stop()
        try:
            yield
        finally:
            if ran:
                self._clock.start()

    def _save_checkpoint(self, model, trial):
        with self._aside():
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # a process that saves nothing else may be the first
        write_file(Path(output_dir) / PLACE.format(rank=self.args.process_index), json.dumps(self._batches.state()))

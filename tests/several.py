"""What one process does and several do alike: runs that test_several_devices.py starts in groups of processes.

Every function gets the same data whatever the number of processes; each takes its share of it.
"""

import copy
import sys
from pathlib import Path

import tiny
import torch
from accelerate import PartialState
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from training import examples, trainer_of

from memlayer.decoders.sharding import shard_decoder
from memlayer.decoders.split import average_table_gradients, join_tables, split_tables, tables_split
from memlayer.layers.memory import MemoryTable
from memlayer.layers.optimizer import RowAdamW
from memlayer.layers.ranks import Ranks, num_ranks
from memlayer.methods import METHODS
from memlayer.methods.sparse_memory import SparseMemoryFinetuner
from memlayer.patch import MemoryPatch

SLOTS, WIDTH, READS = 64, 8, 6
CUTS = {1: [12], 2: [5, 7], 4: [2, 3, 0, 7]}  # tokens of each process: as batches of other lengths have, or none


def rank():
    return dist.get_rank() if num_ranks() > 1 else 0


def tiny_table():
    table = MemoryTable(SLOTS, WIDTH)
    torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(1))
    return table


def read_a_table(shards, dtype=torch.float32, sparse=True):
    """One lookup of 12 tokens, its gradients, and the bytes that this process sent forward and backward."""
    generator = torch.Generator().manual_seed(0)
    table = tiny_table().to(dtype)
    table.sparse = sparse
    slots = torch.randint(0, SLOTS, (12, READS), generator=generator)
    weights = torch.randn(12, READS, generator=generator).to(dtype)
    direction = torch.randn(12, WIDTH, generator=generator).to(dtype)
    cuts = CUTS[num_ranks()]
    slots, weights, direction = (t.split(cuts)[rank()] for t in (slots, weights, direction))
    model = torch.nn.ModuleDict({"table": table})
    if shards > 1:
        split_tables(model, shards)
    weights = weights.clone().requires_grad_()
    read = table(slots, weights)
    sent = [table.columns.ranks.bytes_sent] if shards > 1 else []
    (read * direction).sum().backward()
    sent += [table.columns.ranks.bytes_sent - sent[0]] if shards > 1 else []
    if num_ranks() > 1 and sparse:
        average_table_gradients(model, Ranks())
    found = {"read": read.detach(), "weights": weights.grad, "sent": sent}
    gradient = table.weight.grad.coalesce() if sparse else table.weight.grad
    whole = gradient.to_dense() if sparse else gradient
    if shards > 1:
        whole = table.columns.whole(whole)
        join_tables(model)
        found["joined"] = table.weight.detach()
    return found | {"gradient": whole * num_ranks(), "slots": gradient.indices()[0] if sparse else None}


SETTINGS = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.5, "max_steps": 4, "learning_rate": 1e-3}
SETTINGS |= {"save_strategy": "steps", "save_steps": 2}
SETTINGS["adam_epsilon"] = 1e-4  # with a smaller one a gradient that is zero but for rounding moves by a whole step


def pretrain(folder, shards, resume=None, layers=(0, 2), **settings):
    """Four steps of pretraining, or those after a checkpoint: the model, its losses and how often rows were stepped."""
    model = tiny.memory_model(layers=list(layers))
    settings = {**SETTINGS, "per_device_train_batch_size": 8 // num_ranks(), **settings}
    with tables_split(model, shards):
        trainer = trainer_of(model, folder, examples(32), validation=examples(8), **settings)
        trainer.evaluate()  # an evaluation before training is no reason to leave gradients unreduced
        trainer.train(resume_from_checkpoint=resume and str(resume))
        stepped = trainer.optimizer.optimizer.state[model.model.memory[0].weight]["step"]
        if shards > 1 or rank() == 0:
            model.save_pretrained(Path(folder) / "saved")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"state": dict(model.state_dict()), "losses": losses, "stepped": stepped}


def teach(folder, shards, method="sgd", dtype=torch.float32, resume=None, **settings):
    """Two steps of sparse memory finetuning: the patch and the table."""
    model = tiny.memory_model(dtype=str(dtype).removeprefix("torch."))
    finetuner = SparseMemoryFinetuner(model, tiny.background(model), 9, **settings)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[method]
    optimizer = finetuner.watch(kind(finetuner.parameters(), lr=1.0 if method == "sgd" else 0.01))
    run = {"num_train_epochs": 1, "max_grad_norm": 0.01, "lr_scheduler_type": "constant", "save_strategy": "steps"}
    run |= {"save_steps": 1, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 8 // num_ranks()}
    with tables_split(model, shards):
        trainer = trainer_of(model, folder, examples(16), finetuner, optimizer, **run)
        trainer.train(resume_from_checkpoint=resume and str(resume))
    patch = finetuner.detach().tables[tiny.TABLE]
    return {"slots": patch.slots, "rows": patch.rows, "originals": patch.originals, "state": dict(model.state_dict())}


def train_sharded(folder, shards):
    """Three steps of a loop of one's own; with several processes the decoder's weights are sharded by FSDP2."""
    model, ranks, losses = tiny.memory_model(layers=[0, 2]), num_ranks(), []
    if shards > 1:
        split_tables(model, shards)
    if ranks > 1:
        shard_decoder(model, mesh=init_device_mesh("cpu", (ranks,)))
    table = model.model.memory[0]
    table.sparse = True
    rest = [p for p in model.parameters() if p is not table.weight]
    optimizer = RowAdamW([{"params": rest}, {"params": [table.weight], "weight_decay": 0.0}], lr=1e-3, eps=1e-4)
    for step in range(3):
        batch, mine = tiny.inputs(tiny.batch(seed=step)), 4 // ranks
        loss = model(**tiny.part(batch, rank() * mine, (rank() + 1) * mine)).loss
        loss.backward()
        loss = loss.detach().clone()
        if ranks > 1:
            average_table_gradients(model, Ranks())
            dist.all_reduce(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss) / ranks)
    model.save_pretrained(folder)
    return {"losses": losses, "stepped": optimizer.state[table.weight]["step"]}


class Settings:
    """Of a method."""

    learning_rate, optimizer = 0.01, "adam"


def teach_all_values(folder):
    """One step of a method that trains the tables and nothing else."""
    model = tiny.memory_model()
    prepared = METHODS["dense_memory"](model, None, Settings())
    run = {"max_steps": 1, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 8 // num_ranks()}
    trainer_of(model, folder, examples(8), None, prepared.optimizer, max_grad_norm=0.0, **run).train()
    return {"state": dict(model.state_dict())}


def refusals(shards):
    """What is said to what a split table cannot do."""
    said = {}

    def ask(name, question):
        try:
            question()
        except ValueError as error:
            said[name] = str(error)

    model = tiny.memory_model()
    ask("width", lambda: split_tables(tiny.memory_model(value_width=7), shards))
    ask("groups", lambda: split_tables(tiny.memory_model(), 4 * shards))
    split_tables(model, shards)
    ask("twice", lambda: split_tables(model, shards))
    ask("between", lambda: MemoryPatch.between(model, model))
    ask("dense", lambda: METHODS["dense_memory"](model, None, Settings()))
    finetuner = SparseMemoryFinetuner(model, tiny.background(model), 9, select="gradient")
    ask("gradient", lambda: finetuner.loss(tiny.batch()))
    ask("sharded", lambda: shard_decoder(model))
    return said


def main(job, folder):
    """Runs of one job on every process of a group, kept by rank."""
    folder = Path(folder)
    PartialState(cpu=True)  # starts the group
    world, found = num_ranks(), {}
    for shards in (1, 2, 4)[: {2: 2, 4: 3}[world]]:
        name = f"shards {shards}"
        if job == "quick":
            found[f"read {name}"] = read_a_table(shards)
            found[f"dense {name}"] = read_a_table(shards, sparse=False) if shards > 1 else None
            found[f"half {name}"] = read_a_table(shards, torch.bfloat16)
            found[f"pretrain {name}"] = pretrain(folder / f"pretrain{shards}", shards)
            found[f"teach {name}"] = teach(folder / f"teach{shards}", shards)
            found[f"sharded {name}"] = train_sharded(folder / f"sharded{shards}", shards)
        else:
            resumed = folder.parent / "one" / "pretrain" / "checkpoint-2"
            found[f"resumed {name}"] = pretrain(folder / f"resumed{shards}", shards, resumed)
            found[f"accumulated {name}"] = pretrain(
                folder / f"parts{shards}", shards, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2
            )
            found[f"recomputed {name}"] = pretrain(folder / f"again{shards}", shards, activation_checkpointing=True)
            found[f"adam {name}"] = teach(folder / f"adam{shards}", shards, "adam", torch.bfloat16, max_norm=0.02)
            taught = folder.parent / "one" / "teach" / "checkpoint-1"
            found[f"teach resumed {name}"] = teach(folder / f"teach_resumed{shards}", shards, resume=taught)
    if job == "quick":
        found["all values"] = teach_all_values(folder / "values")
        found["refusals"] = refusals(2)
    torch.save(copy.deepcopy(found), folder / f"rank{rank()}.pt")
    dist.destroy_process_group()  # left to the end of the process, its threads sometimes abort it


if __name__ == "__main__":
    main(*sys.argv[1:])

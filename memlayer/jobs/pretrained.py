"""A model that was pretrained on text: what its run wrote, and what it makes of facts that the text states.

Left out: asking while a model trains. The checkpoints that ``trainer.save_strategy`` kept are asked afterwards.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from memlayer.data.stated import StatedFact
from memlayer.decoders import files
from memlayer.evaluation.stated import Chosen, choose_answers
from memlayer.jobs.checkpoints import damage_of, step_of
from memlayer.jobs.config import PretrainTextRun
from memlayer.jobs.pretrain_text import RESULTS, pretrain_text
from memlayer.jobs.trainer import restore
from memlayer.layers.memory import MemoryTable
from memlayer.machine import best_device
from memlayer.slots.counts import COUNTS_FILE, load_counts


@dataclass
class Trained:
    """One model of the comparison and what became of it.

    Attributes:
        config: its run.
        results: what the run wrote.
        chosen: what it made of the stated facts; none where none are asked.
        stated_curve: [tokens, share of stated facts right] of each checkpoint that was kept, and of the end.
        row: of the report.
    """

    config: PretrainTextRun
    results: dict
    chosen: list[Chosen]
    stated_curve: list[list[float]]
    row: dict


def results_of(run: PretrainTextRun) -> dict:
    """Train a model unless that is done, and read what the run wrote."""
    return json.loads((pretrain_text(run) / RESULTS).read_text(encoding="utf-8"))


def measured(name: str, run: PretrainTextRun, facts: list[StatedFact]) -> Trained:
    """Train a model unless that is done, ask it the facts, and say all of it in a row."""
    results = results_of(run)
    model, tokenizer = files.load(run.output)
    counts, tables = _counts(run, model), [m for m in model.modules() if isinstance(m, MemoryTable)]
    row = {
        "model": name,
        "seed": run.seed,
        "validation_nats": results["validation_loss"],
        "tokens": results["tokens"],
        "seconds": _seconds(results),
        "parameters": results["parameters"]["whole model"],
        "table_parameters": sum(table.weight.numel() for table in tables),
        "flops_per_token": results["speed"]["flops_per_token"],
        "curve": _curve(results),
        "stated_n": len(facts),
        **counts,
    }
    chosen, curve = [], []
    if facts:
        model.to(best_device())
        chosen = _asked(model, tokenizer, facts, name)
        curve = [[results["tokens"], _share_right(chosen)]]
        for step, folder in _checkpoints(run, results["steps"]):
            restore(model, folder)
            tokens = step * results["tokens"] // results["steps"]
            curve.insert(-1, [tokens, _share_right(_asked(model, tokenizer, facts, f"{name}, step {step}"))])
    row |= {"stated_right": _share_right(chosen), "stated_nats": _mean([each.nats[0] for each in chosen])}
    return Trained(run, results, chosen, curve, row | {"stated_curve": curve})


def _asked(model, tokenizer, facts: list[StatedFact], name: str) -> list[Chosen]:
    number = sum(len(fact.choices) for fact in facts)
    with tqdm(total=number, desc=f"asking {name} what the text states", unit="answer") as bar:
        return choose_answers(model, tokenizer, facts, progress=bar.update)


def _checkpoints(run: PretrainTextRun, steps: int) -> list[tuple[int, Path]]:
    """The whole checkpoints that training kept, but for that of its last step, in the order of their steps."""
    found = Path(run.output, "trainer").glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = sorted((step_of(folder), folder) for folder in found if not damage_of(folder))
    return [(step, folder) for step, folder in numbered if step < steps]


def _counts(run: PretrainTextRun, model) -> dict[str, float]:
    """Live slots over all tables and the mean share of reads that the busiest 1 % take; nan without a table."""
    tables = {name: m.num_embeddings for name, m in model.named_modules() if isinstance(m, MemoryTable)}
    if not tables:
        return {"live_slots": math.nan, "top_1_percent_share": math.nan}
    found = [each.summary() for each in load_counts(Path(run.output) / COUNTS_FILE, tables).values()]
    return {
        "live_slots": sum(each["live_slots"] for each in found),
        "top_1_percent_share": _mean([each["top_1_percent_share"] for each in found]),
    }


def _curve(results: dict) -> list[list[float]]:
    """[tokens, validation nats] of every evaluation, the last one included."""
    of_a_step = results["tokens"] / results["steps"]
    points = {entry["step"]: entry["eval_loss"] for entry in results["log"] if "eval_loss" in entry}
    points[results["steps"]] = results["validation_loss"]
    return [[step * of_a_step, loss] for step, loss in sorted(points.items())]


def _seconds(results: dict) -> float:
    """Of training alone, over all processes that went on with it: by the pace that each part of it was logged at."""
    seconds, last = 0.0, 0
    for entry in results["log"]:
        if "tokens_per_second" in entry:
            seconds += (entry["tokens"] - last) / entry["tokens_per_second"]
            last = entry["tokens"]
    return seconds * results["tokens"] / last if last else math.nan


def _share_right(chosen: list[Chosen]) -> float:
    return _mean([float(each.right) for each in chosen])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan

"""The main job end to end: pretrain a memory model on real facts, teach it new ones, see what it forgot.

    python demo.py            one seed; test facts at the strength of each method that validation facts chose
    python demo.py --full     three seeds and their mean, test facts at every strength

Everything goes to runs/demo; what is there already is not done again.
"""

import memlayer_kernels.short_waits  # noqa: F401, before anything loads torch

# isort: split
import argparse
import dataclasses
from pathlib import Path

from tqdm import tqdm

from memlayer.data.facts import facts_of
from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.evaluation.forgetting import drop_in_words
from memlayer.evaluation.provenance import provenance
from memlayer.evaluation.qa import Answered
from memlayer.evaluation.report import CONTROL, format_table, mean_rows, sample, write_report
from memlayer.jobs import compare
from memlayer.jobs.compare import Trial
from memlayer.jobs.config import RunConfig, load_config
from memlayer.jobs.pretrain import pretrain
from memlayer.jobs.run_folder import is_finished
from memlayer.patch import MemoryPatch
from memlayer.refusals import refusals

NUM_VALIDATION, NUM_TEST = 30, 100  # new facts taught, one after the other
FIRST_TEST = 400  # the facts before it were used to find the recipes in configs/
KNOWN_VALIDATION, KNOWN_TEST = (0, 100), (400, 1000)  # known facts asked about

# method -> its config and three strengths: a name and what it changes in the config
METHODS = {
    "sparse memory": (
        "configs/learn_sparse_memory.yaml",
        {f"lr {lr}": [f"learn.learning_rate={lr}"] for lr in (60, 120, 180)},
    ),
    "sparse memory, as in the paper": (
        "configs/learn_paper.yaml",
        {f"lr {lr}": [f"learn.learning_rate={lr}"] for lr in (20, 50, 100)},
    ),
    "full finetuning": (
        "configs/learn_full.yaml",
        {f"lr {lr}": [f"learn.learning_rate={lr}"] for lr in (1e-5, 3e-5, 1e-4)},
    ),
    "LoRA": (
        "configs/learn_lora.yaml",
        {f"lr {lr}": [f"learn.learning_rate={lr}"] for lr in (1e-4, 3e-4, 1e-3)},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three seeds, and every strength on test facts")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write (%(default)s)")
    arguments = parser.parse_args()
    seeds = (0, 1, 2) if arguments.full else (0,)
    rows, samples, configs = [], [], {"methods": METHODS}
    for seed in seeds:
        folder = arguments.output / f"seed{seed}"
        base = pretrained(folder / "base", seed)
        configs["pretrain"] = dataclasses.asdict(base)
        seed_rows, seed_samples = try_methods(base, folder, seed, every_strength=arguments.full)
        rows, samples = rows + seed_rows, samples + seed_samples
    title = f"New facts taught to a memory model, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    shown = mean_rows(rows) if len(seeds) > 1 else rows
    report = write_report(arguments.output / "report", title, shown, provenance(seeds, configs), samples)
    print(f"\n{title}: {NUM_TEST} test facts each, * = strength chosen on {NUM_VALIDATION} validation facts\n")
    print(format_table(shown))
    print("\n" + in_words(rows))
    print(f"\nreport: {report}/report.md, with pareto.png, results.json and samples.jsonl\n")
    show_revert(arguments.output / "seed0", [row for row in rows if row["seed"] == 0])


def pretrained(folder: Path, seed: int) -> RunConfig:
    """The config of the pretrained model of a seed, pretraining it if it is not there."""
    config = load_config("configs/pretrain.yaml", [f"output={folder}", f"seed={seed}"])
    if is_finished(folder):
        print(f"seed {seed}: pretrained model found in {folder}")
    else:
        print(f"seed {seed}: pretraining on {len(facts_of(**dataclasses.asdict(config.data)).known)} known facts")
    pretrain(config)  # trains nothing where that is done, and refuses what another config made
    return config


def try_methods(base: RunConfig, folder: Path, seed: int, every_strength: bool) -> tuple[list[dict], list[dict]]:
    """Every method on validation facts, then on test facts at chosen strengths or all; rows and samples of these."""
    validation = trials(base, folder / "validation", seed, first_new=0, num_new=NUM_VALIDATION, known=KNOWN_VALIDATION)
    first_test = FIRST_TEST + seed * NUM_TEST  # other facts for every seed
    test = trials(base, folder / "test", seed, first_new=first_test, num_new=NUM_TEST, known=KNOWN_TEST)
    num_test = len(test) if every_strength else 1 + len(METHODS)
    with tqdm(total=len(validation) + num_test, desc=f"seed {seed}: teaching and asking", unit="trial") as bar:
        answers = run_all(validation, bar)
        chosen = compare.choose([compare.row(trial, answers) for trial in validation])
        if not every_strength:
            test = [trial for trial in test if chosen[trial.method] == trial.strength]
        before = run_all(test, bar)
    rows = [compare.row(t, before, chosen=chosen[t.method] == t.strength) for t in test]
    best = next(t for t in test if t.method == "sparse memory" and chosen[t.method] == t.strength)
    after = compare.read_answers(best.folder)
    return rows, [sample(*pair) | {"seed": seed} for pair in zip(before, after, strict=True)]


def run_all(some: list[Trial], bar: tqdm) -> list[Answered]:
    """Run trials, of which the first changes nothing, and return its answers."""
    compare.run_trials(some[::-1], workers=2, progress=lambda trial: bar.update())  # the longest ones first
    return compare.read_answers(some[0].folder)


def trials(
    base: RunConfig, folder: Path, seed: int, first_new: int, num_new: int, known: tuple[int, int]
) -> list[Trial]:
    """The control, then every method at every strength."""
    common = [
        f"checkpoint={base.output}",
        f"seed={seed}",
        f"data.first_new={first_new}",
        f"data.num_new={num_new}",
        "trainer.disable_tqdm=true",
    ]
    settings = {(CONTROL, ""): ("configs/learn_sparse_memory.yaml", [])}
    for method, (path, strengths) in METHODS.items():
        settings |= {(method, strength): (path, overrides) for strength, overrides in strengths.items()}
    return [
        Trial(
            method,
            strength,
            load_config(path, [*overrides, *common, f"output={folder}/{method} {strength}".strip()]),
            known,
        )
        for (method, strength), (path, overrides) in settings.items()
    ]


def in_words(rows: list[dict]) -> str:
    """What the table says of the strengths that each seed chose, averaged over seeds."""
    chosen = mean_rows(row | {"strength": "chosen"} for row in rows if row["chosen"])
    of_method = {row["method"]: row for row in chosen}
    baseline = max((of_method["full finetuning"], of_method["LoRA"]), key=lambda row: row["learning_unseen"])
    lines = ["At the strengths chosen on validation facts:"]
    for row in (of_method["sparse memory"], baseline):
        forgets = drop_in_words(row["known_seen_before"], row["known_seen_after"])
        learns = f"{row['learning_unseen']:.0%} of the new facts in a wording never taught"
        lines.append(f"  {row['method']} answers {learns}; on known facts in trained wordings it {forgets}")
    return "\n".join(lines)


def show_revert(folder: Path, rows: list[dict]) -> None:
    """Apply the chosen patch to the pretrained model, take it back, and compare every bit."""
    strength = next(row["strength"] for row in rows if row["method"] == "sparse memory" and row["chosen"])
    patch = MemoryPatch.load(folder / "test" / f"sparse memory {strength}" / "patch")
    model, _ = files.load(folder / "base")
    before = state_fingerprint(model)
    patch.apply(model)
    learned = state_fingerprint(model)
    patch.revert(model)
    after = state_fingerprint(model)
    print(f"patch of {patch.num_rows} rows: SHA-256 of the whole model")
    print(f"  before    {before}\n  learned   {learned}\n  reverted  {after}")
    if after != before:
        raise RuntimeError("the patch did not revert to the last bit")
    same = "the patch changes nothing: no row was written"
    print("  " + ("the model is back to the last bit" if learned != before else same))


if __name__ == "__main__":
    with refusals("demo.py"):
        main()

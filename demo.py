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

from memlayer.data.facts import facts_of
from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.evaluation.forgetting import drop_in_words
from memlayer.evaluation.provenance import provenance
from memlayer.evaluation.report import write_report
from memlayer.evaluation.rows import forgetting_at_equal_learning, mean_rows
from memlayer.evaluation.tables import format_at_equal_learning, format_table
from memlayer.jobs.compare import SEED, run, trials
from memlayer.jobs.config import CompareRun, RunConfig, load_config
from memlayer.jobs.pretrain import pretrain
from memlayer.jobs.run_folder import is_finished
from memlayer.patch import MemoryPatch
from memlayer.refusals import refusals

PRETRAIN, COMPARE = "configs/pretrain.yaml", "configs/compare.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three seeds, and every strength on test facts")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write (%(default)s)")
    arguments = parser.parse_args()
    folder = arguments.output
    more = ["compare.seeds=3", "compare.every_strength=true"] if arguments.full else []
    comparison = load_config(COMPARE, [f"output={folder}", f"checkpoint={folder}/seed{SEED}", *more])
    seeds = range(comparison.compare.seeds)
    for seed in seeds:
        base = pretrained(folder / f"seed{seed}", seed)
    found = run(comparison)
    configs = {"compare": dataclasses.asdict(comparison), "pretrain": dataclasses.asdict(base)}
    title = f"New facts taught to a memory model, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    equal, came_from = forgetting_at_equal_learning(found.rows), provenance(seeds, configs)
    report = write_report(folder / "report", title, found.shown, came_from, found.samples, equal)
    taught, chose = comparison.compare.num_test, comparison.compare.num_validation
    print(f"\n{title}: {taught} test facts each, * = strength chosen on {chose} validation facts\n")
    print(format_table(found.shown))
    print(format_at_equal_learning(equal), end="")
    print("\n" + in_words(found.rows))
    print(f"\nreport: {report}/report.md, with pareto.png, results.json and samples.jsonl\n")
    show_revert(comparison, found.rows)


def pretrained(folder: Path, seed: int) -> RunConfig:
    """The config of the pretrained model of a seed, pretraining it if it is not there."""
    config = load_config(PRETRAIN, [f"output={folder}", f"seed={seed}"])
    if is_finished(folder):
        print(f"seed {seed}: pretrained model found in {folder}")
    else:
        print(f"seed {seed}: pretraining on {len(facts_of(**dataclasses.asdict(config.data)).known)} known facts")
    pretrain(config)  # trains nothing where that is done, and refuses what another config made
    return config


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


def show_revert(comparison: CompareRun, rows: list[dict]) -> None:
    """Apply the patch that the first seed chose to the pretrained model, take it back, and compare every bit."""
    chosen = {(row["method"], row["strength"]) for row in rows if row["chosen"] and row["seed"] == comparison.seed}
    tried = trials(comparison, comparison.seed, validation=False)
    trial = next(each for each in tried if each.method == "sparse memory" and (each.method, each.strength) in chosen)
    patch = MemoryPatch.load(trial.folder / "patch")
    model, _ = files.load(trial.config.checkpoint)
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

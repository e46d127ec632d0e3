"""The job that asks whether memory earns it: one decoder with memory and its controls, pretrained on the same batches.

Each model is a run of job pretrain_text in a folder of its own, so a comparison that was stopped goes on where it
stopped. The runs differ in ``memory`` alone, and share the tokenizer of the first, so they read the same batches in the
same order and begin with the same decoder.

Equal time is a matter of batches: the dense control of equal FLOPs, unchanged, trains on as many as fit into the time
that the memory's training takes. A block widened until its step takes as long would do as well, but would be another
model, whose width hangs on one machine's noise; so the model stays and its curve goes on. How long a step of either
takes is measured once, in turns (``step_times.py``), and kept with the result.

What the text states is told from the documents that the memory's run has read (``data/stated.py``), and asked of every
model at its end, and at the checkpoints that ``trainer.save_strategy`` kept.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from accelerate import PartialState

from memlayer.data.facts import facts_of
from memlayer.data.hub_sets import local_file
from memlayer.data.lessons import lessons_of_facts, load_lessons
from memlayer.data.mixture import Share
from memlayer.data.packing import Packing, held_out_windows
from memlayer.data.stated import StatedFact, askable, drawn_facts, stated, with_choices
from memlayer.data.tokenizer import load_tokenizer
from memlayer.decoders.controls import CONTROLS, as_control
from memlayer.evaluation.earned import MEMORY, earned_table, write_earned_report
from memlayer.evaluation.probes import compared, probes_over_seeds
from memlayer.evaluation.provenance import provenance
from memlayer.evaluation.stated import probes_of
from memlayer.files import sha256_of, write_file
from memlayer.jobs import recipes
from memlayer.jobs.config import ComparePretrainingRun, PretrainTextRun, load_config
from memlayer.jobs.pretrain_text import arguments_of, build_model, inputs_of, packing_of, sources_of
from memlayer.jobs.pretrained import Trained, measured, results_of
from memlayer.jobs.run_folder import claimed, describe, write_result
from memlayer.jobs.step_times import step_seconds
from memlayer.jobs.text_trainer import TextTrainer

DENSE, DENSE_TIME = "dense", "dense_time"
MODELS, TIMING = "models", "timing.json"


def compare_pretraining(config: ComparePretrainingRun) -> None:
    """Train the models that are not there yet, write the report, and print its table.

    Raises:
        FileNotFoundError, ValueError: a file or a setting does not fit, or a folder holds something else.
    """
    base = _base(config)
    inputs = _inputs(config, base)
    with claimed(config, inputs) as done:
        if done:
            return
        results, samples = _run(config, base)

        def write(folder: Path) -> None:
            write_earned_report(folder, results)
            lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in samples)
            write_file(folder / "stated.jsonl", "".join(lines))

        write_result(config.output, config, inputs, write)
    print(earned_table(results["rows"]))


def _base(config: ComparePretrainingRun) -> PretrainTextRun:
    """The run with memory, as its file and the settings say.

    Raises:
        FileNotFoundError, ValueError: it is none of job pretrain_text, or of a control, or there are several processes.
    """
    if (number := PartialState().num_processes) > 1:
        raise ValueError(f"{number} processes: a comparison of pretrained models runs in one, with all its threads")
    told = config.controls
    base = load_config(recipes.find(told.config, "pretrain_text"), told.settings)
    if not isinstance(base, PretrainTextRun):
        raise ValueError(f"controls.config is {told.config}, of job {base.job}: name one of job pretrain_text")
    if base.memory.control is not None:
        raise ValueError(f"memory.control is {base.memory.control!r} in {told.config}: the memory itself is compared")
    return base


def _inputs(config: ComparePretrainingRun, base: PretrainTextRun) -> dict[str, str]:
    """What a comparison depends on beside its own settings: those of the run with memory, and files by content."""
    told = replace(base, output=config.output, seed=config.seed)
    asked = {f"stated {path}": sha256_of(local_file(path)) for path in config.stated.questions}
    settings = hashlib.sha256(describe(told, {}).encode("utf-8")).hexdigest()
    return {"settings of the pretraining": settings} | inputs_of(told) | asked


def _run(config: ComparePretrainingRun, base: PretrainTextRun) -> tuple[dict, list[dict]]:
    """The results of the report, and a line for each stated fact and seed."""
    rows, samples, timed, of_seeds = [], [], [], []
    for seed in range(config.seed, config.seed + config.controls.seeds):
        folder = Path(config.output) / MODELS / f"seed{seed}"
        memory = replace(base, seed=seed, output=str(folder / MEMORY))
        first = results_of(memory)
        facts = _facts(config, memory, first)
        runs = {MEMORY: memory}
        for name in config.controls.names:
            runs[name] = _control(memory, name, config.controls.timed_steps)
        models = {name: measured(name, run, facts) for name, run in runs.items()}
        if DENSE_TIME in runs:
            timed.append({"seed": seed, **_timing(memory, config.controls.timed_steps)})
        rows += [model.row for model in models.values()]
        samples += [_sample(seed, at, fact, models) for at, fact in enumerate(facts)]
        of_seeds.append({name: probes_of(model.chosen) for name, model in models.items()} if facts else {})
    against = {
        name: _over_seeds([[compared(*pair) for pair in zip(each[name], each[MEMORY])] for each in of_seeds])
        for name in config.controls.names
        if all(of_seeds)
    }
    results = {
        "title": f"{MEMORY} of {config.controls.config} and {', '.join(config.controls.names) or 'no control'}",
        "rows": rows,
        "against": against,
        "choices": config.stated.num_wrong + 1 if config.stated.any else 0,
        "step_seconds": timed,
        "provenance": provenance(sorted({row["seed"] for row in rows}), asdict(config) | {"pretraining": asdict(base)}),
    }
    return results, samples


def _over_seeds(runs: list[list[dict]]) -> list[dict]:
    return runs[0] if len(runs) == 1 else probes_over_seeds(runs)


def _control(memory: PretrainTextRun, name: str, timed_steps: int) -> PretrainTextRun:
    """The run of a control, on the tokenizer that the memory's run has made or was given."""
    kind = DENSE if name == DENSE_TIME else name
    assert kind in CONTROLS
    tokenizer = replace(memory.tokenizer, name=memory.tokenizer.name or memory.output)
    output = str(Path(memory.output).with_name(name))
    run = replace(memory, output=output, tokenizer=tokenizer, memory=as_control(memory.memory, kind))
    if name != DENSE_TIME:
        return run
    seconds = _timing(memory, timed_steps)
    of_a_step = memory.pretrain.batch_size * memory.text.length
    steps = max(1, round(memory.pretrain.tokens // of_a_step * seconds[MEMORY] / seconds[DENSE]))
    return replace(run, pretrain=replace(run.pretrain, tokens=steps * of_a_step))


def _timing(memory: PretrainTextRun, timed_steps: int) -> dict[str, float]:
    """Seconds of a step of the memory and of the dense control, measured once and then read."""
    file = Path(memory.output).with_name(TIMING)
    if not file.is_file():
        tokenizer = load_tokenizer(memory.output)
        packing = packing_of(memory, sources_of(memory), tokenizer)
        trainers = {}
        for name, config in ((MEMORY, memory.memory), (DENSE, as_control(memory.memory, DENSE))):
            model, arguments = build_model(replace(memory, memory=config), tokenizer), arguments_of(memory)
            rates = {"table_learning_rate": memory.pretrain.table_learning_rate}
            one_window = list(held_out_windows(packing, "validation", 1))
            trainers[name] = TextTrainer(model, arguments, packing=packing, validation=one_window, **rates)
        write_file(file, json.dumps(step_seconds(trainers, list(_batches(trainers[MEMORY], timed_steps)))) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


def _batches(trainer: TextTrainer, number: int) -> Iterator[Mapping]:
    """The first batches that training reads; a micro-batch each, where a step has several."""
    for batch in islice(iter(trainer.get_train_dataloader()), number):
        yield {name: tensor for name, tensor in batch.items() if not isinstance(tensor, str)}


def _facts(config: ComparePretrainingRun, memory: PretrainTextRun, results: dict) -> list[StatedFact]:
    """What the documents state that the memory's run has read, each with wrong answers.

    Raises:
        ValueError: they state none of what is to be asked.
    """
    if not config.stated.any:
        return []
    lessons = load_lessons(config.stated.questions)
    if config.stated.facts:
        facts = facts_of(**asdict(memory.data))
        lessons += lessons_of_facts(facts.known, facts.wordings, 1, 0)
    packing = packing_of(memory, sources_of(memory), load_tokenizer(memory.output))
    asked = askable(lessons)
    found = with_choices(stated(asked, _documents_read(memory, packing, results)), config.stated.num_wrong)
    if not found:
        raise ValueError(
            f"of {len(asked)} questions that name their subject the text that was read answers too few to choose among "
            f"{config.stated.num_wrong + 1} answers of a relation: name other stated.questions, or lower num_wrong"
        )
    return drawn_facts(found, config.stated.num_questions)


def _documents_read(memory: PretrainTextRun, packing: Packing, results: dict) -> Iterator[str]:
    """What the documents say that training has read, in the order in which each reader has read them."""
    readers = max(1, memory.trainer.get("dataloader_num_workers", 0))
    tokens = sum(source["tokens"] for source in results["sources"].values())
    for lane in range(readers):
        yield from packing.mixture(Share("training", packing.held_out, lane, readers)).read(tokens / readers)


def _sample(seed: int, at: int, fact: StatedFact, models: Mapping[str, Trained]) -> dict:
    nats = {name: [round(each, 4) for each in model.chosen[at].nats] for name, model in models.items()}
    told = {"question": fact.question.prompt, "choices": fact.choices, "relation": fact.relation, "rule": fact.rule}
    return {"seed": seed, **told, "nats": nats}

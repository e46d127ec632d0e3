"""python benchmarks/large_table.py --folder /tmp/large_table

What it costs to teach facts to a table of 32 GB on a machine with less memory, beside a small table.

Two checkpoints of one small decoder are made: with a small table that fits into memory, and with one of 34 GB whose
values are a hole in a sparse file, which takes no disk and reads as zeros. Each is taught the same facts by the
learning job in a process of its own: the small table loaded, the small table mapped, and the large one mapped, since
it does not fit. Then they are asked, with what was learned and without. Printed are the seconds a fact, the processor's
seconds of the whole job (which other programs disturb less), the highest memory of the process's own, the highest of
all its memory (which counts the file's pages that it has read, and that the system takes back when it needs them), the
seconds of the look for the SHA-256 that the job begins with, and the loss of the right answers. The very first look at
the large table reads all of it, minutes, and is kept beside it.

A hole has no disk to wait for: on a real file each row read for the first time costs a read of 4 KB.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from report import finish
from safetensors.torch import load_file
from torch import Tensor

from memlayer.data.facts import facts_of
from memlayer.data.qa import Question, collate, encode, new_questions, pretraining_examples
from memlayer.data.tokenizer import train_tokenizer
from memlayer.decoders import files
from memlayer.decoders.looked_at import look_at
from memlayer.decoders.mapped import mapped_tables
from memlayer.evaluation.qa import answer_questions
from memlayer.jobs.config import LearnRun
from memlayer.jobs.count import count
from memlayer.jobs.learn import learn
from memlayer.jobs.learn_settings import SparseMemoryConfig
from memlayer.jobs.sections import DataConfig, LearnTableConfig
from memlayer.layers.config import MemoryConfig
from memlayer.layers.product_keys import ProductKeys
from memlayer.machine import use_threads
from memlayer.slots.counts import COUNTS_FILE, save_counts

NUM_BACKGROUND, SEQUENCES = 64, 8
TABLE = "model.memory.0.weight"
CASES = {"small, loaded": ("small", "loaded"), "small, mapped": ("small", "mapped"), "large, mapped": ("large", "auto")}


def main() -> None:
    options = parse_options()
    use_threads()
    if options.case:
        print(json.dumps(teach(options)), flush=True)
        return
    torch.manual_seed(0)
    for name, num_keys in (("small", options.small_keys), ("large", options.large_keys)):
        if not (options.folder / name / COUNTS_FILE).is_file():
            make_checkpoint(options.folder, name, num_keys, options)
    figures = {"facts": options.facts, "steps_per_fact": options.steps}
    for case in CASES:
        if case in options.only:
            command = [sys.executable, __file__, "--case", case, *sys.argv[1:]]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            figures[case] = json.loads(line)
    show(figures)
    finish("large_table", figures)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/large_table"), help="default: %(default)s")
    parser.add_argument("--facts", type=int, default=10, help="facts taught (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps a fact (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.0, help="Adam's rate (default: %(default)s)")
    parser.add_argument("--small-keys", type=int, default=256, help="half-keys of the small table (%(default)s)")
    parser.add_argument("--large-keys", type=int, default=2896, help="half-keys of the large table (%(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of the decoder (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of the decoder (default: %(default)s)")
    parser.add_argument("--value-width", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=[*CASES], default=[*CASES], help="default: all")
    parser.add_argument("--case", choices=[*CASES], help=argparse.SUPPRESS)
    return parser.parse_args()


def make_checkpoint(folder: Path, name: str, num_keys: int, options: argparse.Namespace) -> None:
    """A decoder with memory whose values are zero, with the counts of a little background beside it."""
    facts = facts_of()
    examples = pretraining_examples(facts.known, facts.wordings)[: NUM_BACKGROUND * SEQUENCES]
    small = folder / "small"
    if name == "small":
        tokenizer = train_tokenizer((example.text for example in examples), 2048, folder / "tokenizer")
        memory = MemoryConfig([options.layers // 4], num_keys, value_width=options.value_width, mode="add")
        sizes = {"num_layers": options.layers, "width": options.width, "ffn_width": 3 * options.width}
        files.save(files.build(memory, tokenizer, num_heads=8, max_length=128, **sizes), tokenizer, small)
    else:
        enlarge(small, folder / name, num_keys)
    model, tokenizer = files.load(folder / name)
    encoded = encode(tokenizer, examples)
    documents = [encoded[at : at + SEQUENCES] for at in range(0, len(encoded), SEQUENCES)]
    collator = lambda some: collate(some, pad_token_id=tokenizer.pad_token_id)  # noqa: E731
    counts = count(model, documents, collator, f"{SEQUENCES} sequences about known facts", 8)
    save_counts(counts, folder / name / COUNTS_FILE)


def enlarge(small: Path, large: Path, num_keys: int) -> None:
    """The same decoder with other product keys, and a table of as many slots as they address that is a hole."""
    large.mkdir(parents=True, exist_ok=True)
    for path in small.glob("*.json"):
        (large / path.name).write_bytes(path.read_bytes())
    config = json.loads((small / "config.json").read_text(encoding="utf-8"))
    memory = MemoryConfig.from_dict(config["memory"])
    tensors, width = load_file(small / files.WEIGHTS), config["hidden_size"]
    value_width = tensors.pop(TABLE).shape[1]
    keys = ProductKeys(width, num_keys, memory.num_heads, memory.top_k, value_width // 4 * 2)
    prefix = f"model.layers.{memory.layers[0]}.mlp.memory.keys."
    tensors |= {f"{prefix}{name}": tensor for name, tensor in keys.state_dict().items()}
    config["memory"]["num_keys"] = num_keys
    (large / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_with_hole(large / files.WEIGHTS, tensors, TABLE, [num_keys**2, value_width])


def write_with_hole(path: Path, tensors: Mapping[str, Tensor], hole: str, shape: list[int]) -> None:
    """A safetensors file of float32 tensors and, last, one of zeros that takes no disk."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, size in [*((name, list(tensor.shape)) for name, tensor in tensors.items()), (hole, shape)]:
        num_bytes = 4 * torch.Size(size).numel()
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.float().contiguous().numpy().tobytes())
        file.truncate(8 + len(text) + at)


def teach(options: argparse.Namespace) -> dict:
    """Teach, ask and take back in this process, and say what it took."""
    name, table = CASES[options.case]
    checkpoint = options.folder / name
    before = (checkpoint / files.WEIGHTS).stat()
    figures: dict = {"table_bytes": before.st_size, "disk_bytes": before.st_blocks * 512}
    start = time.perf_counter()
    looked, _ = files.load(checkpoint, table)
    if mapped_tables(looked):
        look_at(looked)
    del looked
    figures["look_s"] = time.perf_counter() - start
    config = LearnRun(
        checkpoint=str(checkpoint),
        output=str(options.folder / f"learned_{name}_{table}"),
        table=LearnTableConfig(place=table),
        data=DataConfig(num_new=options.facts),
        learn=SparseMemoryConfig(optimizer="adam", learning_rate=options.rate, steps_per_fact=options.steps),
        trainer={"disable_tqdm": True},
    )
    with Watched() as watched:
        start = time.process_time()
        learned = learn(config)
        figures["job_processor_s"] = time.process_time() - start
        figures["fact_s"] = learned.seconds / options.facts
        facts = facts_of(num_new=options.facts)
        questions = [each for each in new_questions(facts.new, facts.wordings) if each.wording == "seen"]
        start = time.perf_counter()
        figures["nats_after"] = nats(learned.model, learned.tokenizer, questions)
        figures["ask_s"] = time.perf_counter() - start
        start = time.perf_counter()
        learned.patch.revert(learned.model)
        figures["revert_s"] = time.perf_counter() - start
        figures["nats_before"] = nats(learned.model, learned.tokenizer, questions)
    figures |= {"own_peak_bytes": watched.own_peak, "peak_bytes": status()["VmHWM"]}
    figures |= {"rows_changed": learned.patch.num_rows, "mapped": bool(mapped_tables(learned.model))}
    after = (checkpoint / files.WEIGHTS).stat()
    figures["file_untouched"] = (before.st_mtime_ns, before.st_blocks) == (after.st_mtime_ns, after.st_blocks)
    return figures


def nats(model, tokenizer, questions: list[Question]) -> float:
    """Mean loss of the right answers, a token."""
    answers = answer_questions(model, tokenizer, questions)
    return sum(answer.nll for answer in answers) / len(answers)


class Watched:
    """The highest memory of this process's own in the context, looked at fifty times a second."""

    def __enter__(self):
        self.own_peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self.own_peak = max(self.own_peak, status()["RssAnon"])

    def __exit__(self, *_error) -> None:
        self._ended.set()
        self._thread.join()


def status() -> dict[str, int]:
    """Bytes of this process's memory, by the system's names."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(":", 1) for line in lines if line.endswith("kB"))
    return {name: int(value.split()[0]) << 10 for name, value in pairs}


def show(figures: dict) -> None:
    print(
        f"{'':14}{'table':>9}{'a fact':>10}{'processor, the job':>20}{'own memory':>12}"
        f"{'highest':>10}{'first look':>12}{'rows':>7}{'nats before':>13}{'after':>7}"
    )
    for case in CASES:
        if case in figures:
            one = figures[case]
            print(
                f"{case:14}{one['table_bytes'] / 1e9:6.1f} GB{one['fact_s']:8.2f} s{one['job_processor_s']:18.1f} s"
                f"{one['own_peak_bytes'] / 1e9:9.2f} GB{one['peak_bytes'] / 1e9:7.2f} GB{one['look_s']:10.1f} s"
                f"{one['rows_changed']:7,}{one['nats_before']:13.2f}{one['nats_after']:7.2f}"
            )


if __name__ == "__main__":
    main()

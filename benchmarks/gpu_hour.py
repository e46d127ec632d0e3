"""python benchmarks/gpu_hour.py --output docs/results --seconds 540

All that is to be known of a GPU, one measurement after the other, in calls of a few minutes each.

    tests       tests/kernels, a file at a time
    variants    the ways of kernels/variants.py, and which is the fastest (kernel_variants.py)
    kernels     kernel_times.py at shapes C, A, B and D
    probes      layers, decoding, training and fact steps, peers (gpu_probes.py)
    facts       fact_step.py at its own size
    smollm2     demo_llm.py on a folder with SmolLM2 (--smollm2): a retrofit and a learning run

Each is written to gpu-hour/records.jsonl when it is there. A call begins nothing after --seconds and ends with 1 while
something is left; the same command again goes on where it was, for the same commit, versions and machine. What failed
is tried again at the end. --earlier names the results of an earlier call where the output folder is empty.

--dry runs all of it on a CPU, at tiny shapes, with a clock that says a millisecond each time and Triton interpreted:
what breaks there would have broken on the GPU.
"""

import os
import sys

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

# isort: split
import argparse
import gc
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import gpu_probes
import kernel_variants
import torch
from clocks import Clock, clock_of
from gpu_records import Records
from report import environment, finish

REPO = Path(__file__).resolve().parents[1]
PARTS = ("tests", "variants", "kernels", "probes", "facts", "smollm2")
NOT_HERE = ("test_compile.py",)  # which compiles for GPUs that are not there
TINY_KERNELS = ["--tokens=3", "--half-keys=8", "--width=20", "--key-width=6", "--top-k=4", "--rows=5", "--repeats=1"]
TINY_FACTS = ["--num-slots=1024", "--width=16", "--tokens=32", "--reads=8", "--rows=10", "--repeats=1"]
LEAST_SECONDS = 20  # in which a process can do something


def main() -> None:
    options = parse_options()
    end = time.monotonic() + options.seconds
    clock, where = clock_of(options.dry), environment()
    folder, earlier = options.output / "gpu-hour", options.earlier and options.earlier / "gpu-hour"
    records = Records(folder, where, earlier)
    every = measurements(options, clock, end)
    for name in records.left(list(every)):
        if end - time.monotonic() < LEAST_SECONDS:
            break
        print(f"-- {name}", file=sys.stderr, flush=True)
        records.add(name, every[name])
        gc.collect()
        if not clock.dry:
            torch.cuda.empty_cache()
    told = {name: record for name, record in records.all.items() if name in every}
    print("kernels/variants.py would be faster with:", *kernel_variants.advice(told), sep="\n    ")
    finish("gpu_hour", told)
    failed = [name for name, record in told.items() if "failed" in record]
    left = [name for name in every if name not in told]
    if failed or left:
        sys.exit(f"failed: {'; '.join(failed) or 'none'}; not measured yet: {'; '.join(left) or 'none'}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder to write (%(default)s)")
    parser.add_argument("--earlier", type=Path, help="such a folder of an earlier call, to go on from")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing after so many (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (all)")
    parser.add_argument("--smollm2", type=Path, help="folder with SmolLM2 or another small decoder of Hugging Face")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU, without timing")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --dry tries everything without one")
    if options.smollm2 and not (options.smollm2 / "config.json").is_file():
        parser.error(f"--smollm2 is {options.smollm2}, which has no config.json")
    return options


def measurements(options: argparse.Namespace, clock: Clock, end: float) -> dict[str, Callable[[], dict | None]]:
    """Every measurement of the chosen parts by name, in the order in which they should be known."""
    parts = {
        "tests": kernel_tests(clock, end),
        "variants": kernel_variants.measurements(clock),
        "kernels": kernel_times(options, clock, end),
        "probes": gpu_probes.measurements(clock),
        "facts": {"fact_step.py": lambda: script(end, "benchmarks/fact_step.py", *(TINY_FACTS if clock.dry else ()))},
        "smollm2": {"retrofit and learning": lambda: smollm2(options, end)},
    }
    return {name: measure for part in PARTS if part in options.only for name, measure in parts[part].items()}


def kernel_tests(clock: Clock, end: float) -> dict[str, Callable]:
    """A run of pytest for each file; of one file that is quick anywhere, if dry."""
    files = [path for path in sorted((REPO / "tests/kernels").glob("test_*.py")) if path.name not in NOT_HERE]
    files = [path for path in files if not clock.dry or path.name == "test_checks.py"]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return {f"tests of {path.name}": lambda path=path: script(end, *pytest, str(path)) for path in files}


def kernel_times(options: argparse.Namespace, clock: Clock, end: float) -> dict[str, Callable]:
    """kernel_times.py for each group of shapes, which goes on where it was by itself."""

    def measure(shapes: str) -> dict | None:
        device = ["--device=cpu", *TINY_KERNELS] if clock.dry else ["--device=cuda"]
        seconds = f"--seconds={max(1, end - time.monotonic() - LEAST_SECONDS):.0f}"
        folders = [f"--output={options.output}", *([f"--earlier={options.earlier}"] if options.earlier else [])]
        return script(end, "benchmarks/kernel_times.py", *device, "--shapes", shapes, seconds, *folders)

    return {f"kernel_times.py, {shapes}": lambda shapes=shapes: measure(shapes) for shapes in "CABD"}


def smollm2(options: argparse.Namespace, end: float) -> dict | None:
    """The demo on a real decoder: memory attached, facts taught and asked, the patch taken back."""
    if options.smollm2 is None:
        return {"skipped": "no folder with SmolLM2 was given: --smollm2 FOLDER (make demo-llm unpacks one)"}
    return script(end, "demo_llm.py", f"--model={options.smollm2.resolve()}", f"--output={options.output / 'smollm2'}")


def script(end: float, *command: str) -> dict | None:
    """Seconds and last lines of a Python process; None if it had to be ended, or says that not all is measured yet.

    Raises:
        RuntimeError: it ended with an error, which is told with its last lines.
    """
    begin = time.monotonic()
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": path},
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=max(1.0, end - begin),
        )
    except subprocess.TimeoutExpired:
        return None
    said = (done.stdout + done.stderr).strip().splitlines()[-12:]
    if done.returncode and said and "0 operations failed; not measured yet" in said[-1]:
        return None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: " + " | ".join(said)[-400:])
    return {"wall_s": time.monotonic() - begin, "said": [line[:2000] for line in said]}


if __name__ == "__main__":
    main()

"""What a run uses of the machine at hand: the precision of its products and how many threads.

One place decides, from what the processor says it can do and not from a clock: a run that goes on after a stop has to
decide the same. Whoever sets ``trainer.bf16``, ``trainer.fp16`` or ``OMP_NUM_THREADS`` decides instead. How threads
wait is settled earlier, before torch is loaded: see memlayer_kernels.short_waits.

float16 is never chosen: its gradients need scaling, and no run of ours on a GPU has tested that. ``trainer.fp16=true``
asks for it.
"""

import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

AUTO = "auto"
X86 = ("x86_64", "AMD64")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time in how many


def resolve_precision(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer section with ``bf16: auto`` replaced by what this machine does fast.

    Raises:
        ValueError: ``bf16`` is a word other than "auto".
    """
    wanted = trainer.get("bf16")
    if isinstance(wanted, str):
        if wanted != AUTO:
            raise ValueError(f"trainer.bf16 is {wanted!r}, must be true, false or {AUTO!r}")
        return {**trainer, "bf16": not trainer.get("fp16", False) and has_fast_bfloat16()}
    return dict(trainer)


def best_device() -> torch.device:
    """The GPU that the kernels run on, NVIDIA's or AMD's, else the CPU: they have no way on a Mac's GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32 ones on the device that a run takes.

    On a GPU that has them in hardware. On a CPU with instructions for them (AVX512-BF16, AMX, or Arm's): elsewhere
    they are emulated, 50 times slower than float32 on a processor with AVX2 (measured: 1.0 against 49 GFLOP/s).
    """
    if best_device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in X86:
        instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        # What the user takes away counts as absent (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA).
        in_use = torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))
        return instructions and in_use and not os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper().startswith("AVX2")
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def attention() -> str | None:
    """The attention of a model that is built or loaded; None leaves it to transformers, which takes torch's fused one.

    Where a CPU has fast bfloat16 it is transformers' own: the backward pass of the fused one takes longer there in
    bfloat16 than all the rest saves. Building and loading ask here alike, so a loaded model's logits are the same bits.
    """
    return "eager" if best_device().type == "cpu" and has_fast_bfloat16() else None


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than its container's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _quota(CPU_QUOTA) or cores)


def _quota(path: Path) -> int | None:
    """Whole cores that a container's quota comes to, None where there is no quota."""
    try:
        time, period = path.read_text(encoding="utf-8").split()
        return max(1, math.ceil(int(time) / int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return None


def use_threads() -> None:
    """Give torch as many threads as there are cores to run them; it counts the host's cores in a container."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > (cores := usable_cores()):
        torch.set_num_threads(cores)


def describe(arguments: TrainingArguments) -> str:
    """What a run uses, in one line."""
    precision = "bfloat16 autocast" if arguments.bf16 else "float16 autocast" if arguments.fp16 else "float32"
    if arguments.device.type != "cpu":
        return f"running on {arguments.device} in {precision}"
    cores, threads = usable_cores(), torch.get_num_threads()
    slow = "" if arguments.bf16 or has_fast_bfloat16() else ", since this processor has no fast bfloat16"
    waits = "short" if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" else "spinning"
    turns = f" of {turns} turns" if (turns := os.environ.get("GOMP_SPINCOUNT")) else ""
    processor = torch.backends.cpu.get_cpu_capability()
    return (
        f"running on {cores} CPU core{'s' * (cores > 1)} ({processor}) in {precision}{slow}; "
        f"{threads} thread{'s' * (threads > 1)}, {waits} waits{turns}"
    )

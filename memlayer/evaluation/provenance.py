"""Where a number comes from: command, commit, machine, versions, seeds, config.

A figure without these cannot be checked, so results and benchmarks carry them. Nothing is guessed: what
cannot be found out is "unknown".
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("memlayer", "torch", "transformers", "peft", "triton")
REPO = Path(__file__).resolve().parents[2]


def provenance(seeds: Sequence[int], config: Mapping) -> dict:
    """Everything needed to run this again, as plain values ready for JSON."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "seeds": list(seeds),
        "config": dict(config),
    }


def commit(repo: Path = REPO) -> str:
    """Hash of the checkout this code runs from, "+changes" when files differ from it; "unknown" elsewhere.

    Where git does not answer in time, what it was asked for is unknown.
    """
    top = _git(repo, "rev-parse", "--show-toplevel")
    head = _git(repo, "rev-parse", "--verify", "HEAD")
    if not head or not top or Path(top).resolve() != repo:
        return "unknown"
    changes = _git(repo, "status", "--porcelain", "--untracked-files=no")
    return head + ("+changes unknown" if changes is None else "+changes" if changes else "")


def machine() -> dict[str, str | int]:
    """Processor, cores this process may use, memory in bytes, and the GPU if torch sees one."""
    found = {
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cores() -> int | str:
    if hasattr(os, "sched_getaffinity"):  # neither macOS nor Windows has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or "unknown"


def _memory() -> int | str:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others may lack the names
        return "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def _git(repo: Path, *arguments: str) -> str | None:
    """What git says; None when there is no git, no repository, or no answer in time."""
    try:
        command = ["git", "-C", str(repo), *arguments]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() if said.returncode == 0 else None

"""What every benchmark prints last: one JSON object with its figures and where they come from.

Figures are in SI units, named in their keys (forward_s, peak_bytes); ratios and counts have no unit.
"""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch


def environment() -> dict:
    """Device, versions and commit of this run."""
    return {"device": _device(), "versions": _versions(), "commit": _commit()}


def finish(name: str, figures: dict) -> dict:
    """Print the last line of a benchmark and return what it says."""
    result = {"name": name, "figures": figures, **environment()}
    print(json.dumps(result), flush=True)
    return result


def _device() -> dict:
    device = {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        device["gpu"] = torch.cuda.get_device_name()
    return device


def _cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "memlayer"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _commit() -> str:
    """The commit of this checkout, marked where files differ from it; unknown outside a checkout.

    MEMLAYER_COMMIT in the environment tells it where the files went without their history.
    """
    if told := os.environ.get("MEMLAYER_COMMIT"):
        return told
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("-changed" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"commit unknown: {error}", file=sys.stderr)
        return "unknown"

"""What a number was measured on: device, clocks, versions, commit."""

import csv
import os
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
NOT_PERFORMANCE = "NO NVIDIA GPU HERE: nothing was measured. These are NOT performance results."
_NVIDIA_SMI_FIELDS = [
    *("driver_version", "clocks.current.sm", "clocks.current.memory", "clocks.max.sm"),
    *("clocks.max.memory", "temperature.gpu", "power.draw", "power.limit"),
]


def describe() -> dict[str, str | int | float | None]:
    """Flat facts for the head of a table and for JSON; GPU entries are absent without one."""
    facts: dict[str, str | int | float | None] = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "platform": platform.platform(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": properties.L2_cache_size / 1e6,
            "memory_gb": properties.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **_nvidia_smi(),
        }
    return facts


def commit() -> str:
    """Short hash of the checkout, with ``+`` if tracked files differ from it.

    ``SMLP_COMMIT`` stands in where the code was copied without its git directory; then ``unknown``.
    """
    try:
        found = _git("rev-parse", "--short=9", "HEAD")
        return found + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SMLP_COMMIT", "unknown")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def _nvidia_smi() -> dict[str, str]:
    """Driver, clocks and power as nvidia-smi reads them; empty where it cannot be asked."""
    query = f"--query-gpu={','.join(_NVIDIA_SMI_FIELDS)}"
    command = ["nvidia-smi", query, "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = next(csv.reader(answer.stdout.splitlines(), skipinitialspace=True), [])
    return dict(zip(_NVIDIA_SMI_FIELDS, values, strict=False))

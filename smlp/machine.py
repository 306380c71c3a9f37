"""The one description of this machine, for logs, bug reports and measured numbers."""

import csv
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

Facts = dict[str, str | int | float | None]

PACKAGES = ("smlp-kernels", "triton", "einops", "numpy")
_NVIDIA_SMI_FIELDS = [
    *("driver_version", "clocks.current.sm", "clocks.current.memory", "clocks.max.sm"),
    *("clocks.max.memory", "temperature.gpu", "power.draw", "power.limit"),
]


def describe(gpu: int = 0) -> Facts:
    """Return facts by name: None where unknown; those of a GPU are absent without one.

    Args:
        gpu: the index of the GPU to describe.
    """
    facts: Facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts["torch"] = torch.__version__  # with its build, which the package's own leaves out
    facts |= {package: _version(package) for package in PACKAGES}
    facts["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(gpu)
        facts |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": properties.L2_cache_size / 1e6,
            "memory_gb": properties.total_memory / 1e9,
            "cudnn": torch.backends.cudnn.version(),
            # nvidia-smi counts GPUs that CUDA_VISIBLE_DEVICES leaves out
            **(_nvidia_smi(f"GPU-{getattr(properties, 'uuid', gpu)}") or _nvidia_smi(str(gpu))),
        }
    return facts


def in_words(facts: Mapping[str, object], names: Sequence[str] = ()) -> str:
    """Facts as ``torch 2.13.0, triton 3.7.1``: all of them or those named, without unknown ones."""
    return ", ".join(
        f"{name} {facts[name]}" for name in names or facts if facts.get(name) is not None
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # as a source tree that is not installed
        return None


def _nvidia_smi(gpu: str) -> dict[str, str]:
    """Driver, clocks and power as nvidia-smi reads them; empty where it cannot be asked."""
    query = f"--query-gpu={','.join(_NVIDIA_SMI_FIELDS)}"
    command = ["nvidia-smi", query, "--format=csv,noheader", f"--id={gpu}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = next(csv.reader(answer.stdout.splitlines(), skipinitialspace=True), [])
    return dict(zip(_NVIDIA_SMI_FIELDS, values, strict=False))

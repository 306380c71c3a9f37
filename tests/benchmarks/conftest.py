"""Invented results of a report, shared by the tests of what is made from them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.measure_block import CHUNK_MB, CHUNK_PASSES
from benchmarks.recorder import Recorder

CEILINGS = {
    "copy_bytes_per_s": 4e12,
    "gemm_flops_per_s": {"bf16": 8e14},
    "device": "invented",
}


def _row(shape: str, pass_: str, provider: str, us: float) -> dict:
    return {
        "group": f"{pass_} {shape}",
        "provider": provider,
        "pass": pass_,
        "shape": shape,
        "size": [128, 384, 14, 14],
        "dtype": "bf16",
        "layout": "channels_last",
        "gpu_us": us,
        "floor_us": 30.0,
        "share_of_floor": 30.0 / us,
    }


def _write(folder: Path, commits: tuple[str, str] = ("abc", "abc")) -> Recorder:
    """A folder in which two measurements of one shape, and growth of one, were recorded."""
    quick = [_row("small-14", "inference", *p) for p in (("eager_nhwc", 240.0), ("fused", 60.0))]
    tuned = [_row("small-14", "inference", *p) for p in (("compiled", 120.0), ("fused", 66.0))]
    growth = [_row("growth-14", "inference", "fused", 80.0)]
    results = {
        "quick": {"rows": quick, "failures": {}},
        "tuned": {"rows": tuned, "failures": {}},
        "growth": {"rows": growth, "failures": {}},
        "chunks small-14": {
            f"{megabytes} MB": {p: {"us": us, "share_of_floor": 0.5} for p in CHUNK_PASSES}
            for megabytes, us in zip(CHUNK_MB, (9.0, 8.0, 7.0, 8.0, 9.0), strict=True)
        },
        "host time": {"fused": {"inference": 20.0}, "empty_function": 4.0},
    }
    entries = {
        name: {
            "status": "measured",
            "seconds": 1.0,
            "environment": {"commit": commits[name == "tuned"], "gpu": "invented"},
            "ceilings": CEILINGS,
            "result": result,
        }
        for name, result in results.items()
    }
    entries["bad"] = {"status": "failed", "seconds": 1.0, "reason": "RuntimeError: none"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"measurements": entries}))
    return Recorder(folder)


@pytest.fixture
def write_results() -> Callable[..., Recorder]:
    return _write


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

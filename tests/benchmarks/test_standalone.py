"""The jobs of the report's processes, on shapes that the reference computes in milliseconds."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import standalone
from benchmarks.shapes import Shape

TINY = Shape("tiny", 1, 4, 3, 3)


def test_first_call_times_every_step() -> None:
    seconds = standalone.first_call(TINY)
    assert list(seconds) == [
        "import",
        "first forward",
        "first backward",
        "second forward",
        "second backward",
    ]
    assert all(value >= 0 for value in seconds.values())


def test_nothing_is_imported_before_the_clock_that_times_the_import() -> None:
    program = (
        "import sys, benchmarks.standalone; print({'triton', 'smlp_kernels'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert child.stdout == "set()\n"


def test_every_variant_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Block(torch.nn.Linear):
        def __init__(self, height, width, channels, *, device, dtype):
            super().__init__(width, width, device=device, dtype=dtype)

        def forward(self, x):
            precision = torch.get_float32_matmul_precision()
            seen.append((x.dtype, x.is_contiguous(), precision))
            return super().forward(x)

    monkeypatch.setattr("smlp_kernels.FusedSMLPBlock", Block)
    standalone.compile_kernels(TINY)
    assert seen == [
        (torch.bfloat16, False, "highest"),
        (torch.float32, False, "high"),
        (torch.float16, False, "highest"),
        (torch.bfloat16, True, "highest"),
    ]


def test_the_last_line_printed_is_json() -> None:
    command = [sys.executable, "-m", "benchmarks.standalone", "first-call", "cifar-4"]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "first forward" in json.loads(child.stdout.splitlines()[-1])

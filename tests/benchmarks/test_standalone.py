"""The jobs of the report's processes, on shapes that the reference computes in milliseconds."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import standalone
from benchmarks.shapes import STAGES


def test_first_call_times_every_step() -> None:
    seconds = standalone.first_call("cifar-4")
    assert list(seconds) == ["import", "constructor", "forward", "backward"]
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
    standalone.compile_kernels("rehearsal-7")
    assert seen == [
        (torch.bfloat16, False, "highest"),
        (torch.float32, False, "high"),
        (torch.float16, False, "highest"),
        (torch.bfloat16, True, "highest"),
    ]


def run(*arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "benchmarks.standalone", *arguments]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == status, child.stderr
    return child.stdout + child.stderr


def test_first_calls_are_cold_then_warm() -> None:
    cold, warm = (json.loads(line) for line in run("first-calls", "cifar-4").splitlines())
    assert cold["cold"]["forward"] > 0 and warm["warm"]["forward"] > 0


def test_both_first_calls_have_one_cache_which_nobody_else_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    seen = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count: int, context: object) -> None:
            super().__init__(count)
            folder = os.environ["TRITON_CACHE_DIR"]
            seen.append((folder, os.listdir(folder)))
            (Path(folder) / "compiled").touch()

    monkeypatch.setattr(standalone, "ProcessPoolExecutor", Pool)
    standalone.first_calls("cifar-4")
    (cold, before), (warm, between) = seen
    assert cold == warm and (before, between) == ([], ["compiled"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_every_stage_is_compiled_and_failures_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def compile_kernels(name: str) -> None:
        asked.append(name)
        if failing:
            raise RuntimeError(f"no such tile for {name}")

    monkeypatch.setattr(
        standalone, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count)
    )
    monkeypatch.setattr(standalone, "compile_kernels", compile_kernels)
    failing = False
    standalone.compile_stages()
    assert sorted(asked) == sorted(shape.name for shape in STAGES)
    assert json.loads(capsys.readouterr().out) == {"compiled": [shape.name for shape in STAGES]}
    failing = True
    with pytest.raises(SystemExit, match="FAILED tiny-7: no such tile for tiny-7"):
        standalone.compile_stages()


def test_a_job_has_the_shape_that_it_needs() -> None:
    for arguments in (("forward",), ("compile-stages", "small-56")):
        assert "shape: expected for every job but" in run(*arguments, status=2)

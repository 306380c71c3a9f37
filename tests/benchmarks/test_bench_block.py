"""``pytest benchmarks`` itself on a machine without a GPU: one screen, JSON, no interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_block, timing
from benchmarks.environment import ROOT
from benchmarks.providers import PROVIDERS
from benchmarks.roofline import Ceilings
from benchmarks.shapes import BY_NAME, Shape
from benchmarks.timing import Samples
from benchmarks.workbench import open_workbench


def test_rehearsal(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q"]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={target}"]
    command += ["--shapes=rehearsal-7", "--dtypes=fp32", "--passes=inference,fwd"]
    # pytest-benchmark switches itself off where pytest-xdist's variables are seen
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    child = subprocess.run(
        command,
        cwd=ROOT,
        env={**env, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-2000:]
    lines = child.stdout.splitlines()
    assert len(lines) < 30 and "NOT performance results" in child.stdout
    assert "  shapes     rehearsal-7" in lines and "  layouts    channels_last" in lines
    assert "  fused needs an NVIDIA GPU" in lines and "Here, 10 benchmarks ran" in child.stdout
    assert lines[-1] == f"written: {target}"
    run = json.loads(target.read_text())
    groups = [entry["extra_info"]["group"] for entry in run["benchmarks"]]
    assert groups == sorted(groups, key=groups.index) and len(set(groups)) == 4  # one after another
    timed = {entry["extra_info"]["provider"] for entry in run["benchmarks"]}
    assert timed == {"eager_nchw", "eager_nhwc", "handwritten"}
    assert run["ceilings"] is None
    assert run["machine_info"]["smlp"]["torch"]


def test_an_unknown_shape_is_named() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--shapes=huge", "-q"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode != 0 and "shapes: expected one of" in child.stdout


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_numbers_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, provider = BY_NAME["cifar-4"], PROVIDERS["handwritten"]  # x: 128 * 128 * 16 elements
    ceilings = Ceilings(1e12, {"fp32": 1e15}, "invented")
    monkeypatch.setattr(timing, "peak_bytes", lambda step: 3_000_000)
    with open_workbench(shape, "fp32", "channels_last", "inference", [provider]) as bench:
        plain = bench_block.row(bench, provider, ceilings)
        bench.gpu_us = {"handwritten": Samples(20.0, 0.05)}
        row = bench_block.row(bench, provider, ceilings)
    weights = 2 * (4 * 4 + 4) + 128 * 384 + 128
    floor = 1e6 * 4 * (2 * 128 * 128 * 16 + weights) / 1e12  # memory takes longer here
    assert row["floor_us"] == pytest.approx(floor)
    assert row["share_of_floor"] == pytest.approx(floor / 20)
    assert row["gpu_us"] == 20.0 and row["spread"] == 0.05 and row["peak_mb"] == 3.0
    assert row["group"] == f"inference {shape} fp32 channels_last"
    assert 0 < row["errors"]["output"] < 1e-6 and row["host_us"] > 0
    assert "gpu_us" not in plain and "kept_mb" not in plain  # without a GPU, without a backward


@pytest.mark.parametrize("pass_", ["fwd", "fwd+bwd"])
def test_memory_kept_by_hand(pass_: str) -> None:
    """fp32 [2, 6, 5, 7] is 1,680 bytes, and eager keeps five of them.

    x for proj_w, its permuted copy for proj_h, and the concatenation of three for the 1x1
    convolution.
    """
    eager = PROVIDERS["eager_nchw"]
    with open_workbench(Shape("odd", 2, 6, 5, 7), "fp32", "nchw", pass_, [eager]) as bench:
        row = bench_block.row(bench, eager, None)
    assert row["kept_mb"] * 1e6 == pytest.approx(5 * 1680)

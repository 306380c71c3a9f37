"""Everything that is to be measured on a GPU, run to its end on a machine that seems to have one.

The numbers mean nothing; that there are any does. Values of kernels are other tests' matter.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HAS_GPU
from tests.rehearsal.machine import ROOT, environment

pytestmark = [
    pytest.mark.skipif(HAS_GPU, reason="there is a GPU here, nothing is to be rehearsed"),
    pytest.mark.complete,
]
VARIABLES = {
    "PYTEST_ADDOPTS": "-p tests.rehearsal.small_tests",
    "SMLP_COMMIT": "rehearsal",  # whatever is edited meanwhile
}
BESIDE_REFERENCE = {"eager_nchw", "eager_nhwc", "handwritten", "fused"}
COMPILED = {"compiled", "handwritten_compiled"}
# of steps that differ in little but shapes, types and tools, the first
LEFT_OUT = "base|tiny|host|(dram|limits)-small-56|limits-small-28|racecheck|small-fp16"
STEPS = f"^(?!{LEFT_OUT}|compiled-(?!small-14))"


def run(*command: str, missing: Iterable[str] = (), status: int = 0) -> str:
    """What a Python command prints on the machine that seems to have a GPU."""
    child = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(missing) | VARIABLES,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert child.returncode == status, child.stdout[-5000:]
    return child.stdout


def test_gpu_day(tmp_path: Path) -> None:
    out = tmp_path / "report"
    day = ("-m", "benchmarks.gpu_day", "--out", str(out), "--minutes", "60", "--only", STEPS)
    # tests of large tensors want more memory than there seems to be
    assert "1 of " in run(*day).splitlines()[-1]  # is left
    entries = json.loads((out / "results.json").read_text())["steps"]
    large = entries.pop("tests-large")
    assert large["reason"].count("GiB of free GPU memory") > 0
    printed = run(*day)  # in the same folder
    assert "tests-large: status failed" in printed and "network: status" not in printed
    assert "NOT performance results" not in printed

    results = json.loads((out / "results.json").read_text())
    assert results["environment"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert results["environment"]["clocks.max.sm"] == "1980 MHz"
    for name, entry in entries.items():
        assert entry["status"] == "measured", f"{name}: {entry}"
        assert results["steps"][name] == entry  # not measured again
    assert entries["tests"]["result"]["passed"] > 15
    assert set(entries["hopper"]["result"]) == {"small-56", "small-14", "small-28", "base-7"}
    assert {"cold", "warm"} == set(entries["first-calls"]["result"])
    assert {"training", "inference"} <= set(entries["network"]["result"])

    rows = [row for entry in entries.values() for row in entry["result"].get("rows", [])]
    providers = {row["provider"] for row in rows}
    assert providers == BESIDE_REFERENCE | COMPILED
    assert all(row["gpu_us"] > 0 for row in rows)
    page = (out / "report.md").read_text()
    assert page.count("| geometric mean, worst ") == 10  # two passes of stages in three, others
    assert "(host microseconds)" in page and "- dram-small-28: {" in page
    assert (out / "share_of_floor.png").read_bytes().startswith(b"\x89PNG")


def test_benchmarks(tmp_path: Path) -> None:
    target, folder = tmp_path / "run.json", tmp_path / "report"
    options = ("--shapes=rehearsal-7", "--dtypes=bf16", "--passes=inference,fwd,bwd,fwd+bwd")
    command = ("-m", "pytest", "benchmarks", "--benchmark-only", f"--benchmark-json={target}")
    printed = run(*command, *options, f"--report={folder}", "-p", "no:cacheprovider")
    assert "ceilings measured on NVIDIA H100" in printed and "skipped" not in printed
    assert printed.count("| geometric mean, worst ") == 4  # a table for each pass
    files = (target, folder / "report.md", folder / "share_of_floor.png")
    assert printed.splitlines()[-1] == f"written: {' '.join(map(str, files))}"
    assert all(file.exists() for file in files)
    written = json.loads(target.read_text())
    assert written["ceilings"] and written["machine_info"]["smlp"]["gpu"]
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in written["benchmarks"]:
        found.setdefault(entry["extra_info"]["group"], []).append(entry["extra_info"])
    assert len(found) == 4
    for rows in found.values():
        assert {row["provider"] for row in rows} == BESIDE_REFERENCE | COMPILED
        assert all(row["gpu_us"] > 0 and row["peak_mb"] > 0 for row in rows)


def test_demo(tmp_path: Path) -> None:
    printed = run("-m", "examples.mnist", "--out", str(tmp_path), "--epochs", "30")
    assert "FAILED" not in printed and "kinds of blocks on NVIDIA H100" in printed
    report = (tmp_path / "report.txt").read_text()
    for blocks in ("plain", "fused"):
        assert re.search(rf"{blocks} blocks: .* s per epoch, peak of 0 MiB", report)
    assert "the kernels ran on the GPU, on 20 images" in report
    for name in ("loss.png", "receptive_field.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("declared_entry_points")
def test_training(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs the demo extra")
    command = ("-m", "smlp.train", "--out", str(tmp_path / "run"), "--no-progress")
    small = "--d-model 8 --depth 2,1 --batch-size 128 --warmup-epochs 0 --epochs 1"
    printed = run(
        *command, *small.split(), "--device", "cuda", "--amp", "bf16", "--fused", "--compile"
    )
    assert "on cuda:0 (NVIDIA H100 80GB HBM3)" in printed
    assert "epoch 2 of 2" in run(*command, "--resume", "--epochs", "2")


def test_numerics(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin: python -m benchmarks.numerics -->\n<!-- end -->\n")
    run("-m", "benchmarks.numerics", "--page", str(page))
    text = page.read_text()
    assert text.count("| small-14 |") == 4 and "NVIDIA H100 80GB HBM3, commit" in text


def test_tiles() -> None:
    program = "import sys; from tools.tune import main; sys.exit(main(sys.argv[1:]))"
    printed = run("-c", program, "--shape", "2,16,8,8", "--dtype", "bf16").splitlines()
    for pass_ in ("forward", "backward"):
        timed = [line for line in printed if line.startswith(pass_)]
        assert len(timed) == 4  # the table as it is, two tiles, another number of programs
        assert all(re.search(r": \d+\.\d us$", line) for line in timed), timed
    assert "2,16,8,8 [2, 16, 8, 8], bf16, NVIDIA H100 80GB HBM3, Triton " in "\n".join(printed)
    assert re.match(r"AxisRow\(\(90,\), (True|False), 2, 16, |no row is faster than", printed[-1])


def test_without_packages_that_a_gpu_machine_may_lack(tmp_path: Path) -> None:
    """Nor is any child started in Triton's interpreter, which would end with an error there."""
    tests = ("tests/examples/test_mnist.py", "tests/smlp/test_data.py")
    printed = run("-m", "pytest", "-q", *tests, "-p", "no:cacheprovider", missing=["mlxtend"])
    assert " passed" in printed and "needs the demo extra" in printed
    printed = run("-m", "smlp_kernels.env_report")
    assert "runs on the fused kernels" in printed and "NVIDIA H100" in printed


def test_make_runs_what_is_rehearsed() -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "-n", "demo", "bench", "gpu-day", "PYTHON=python3", "VENV="]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for start in (
        "python3 -m examples.mnist --out ",
        "python3 -m pytest benchmarks --benchmark-only --benchmark-json=",
        "python3 -m benchmarks.gpu_day --out ",
    ):
        assert any(line.startswith(start) for line in printed.splitlines()), start


CONVOLUTION = """
import torch
x, w = torch.randn(1, 64, 4, 4), torch.randn(64, 64, 1, 1)
def error():
    exact = torch.conv2d(x.double(), w.double())
    return (torch.conv2d(x, w) - exact).norm() / exact.norm()
before = error()
import tests.conftest
print(bool(before > 1e-4), bool(error() < 1e-6))
"""


def test_float32_of_the_tests_is_ieee() -> None:
    """CuDNN's default is not: what PyTorch computes is what kernels are held to."""
    assert run("-c", CONVOLUTION).split() == ["True", "True"]

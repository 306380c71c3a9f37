"""What takes processes of its own: compiling, the tests, DRAM bytes by ncu, the first call."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.environment import ROOT
from benchmarks.recorder import Context, Measurement, SkippedError
from benchmarks.roofline import io_bytes
from benchmarks.shapes import STAGES, Shape

NCU_CALLS = 8
CHECKER_FOUND = 9  # the exit status that is asked for
COMPILE_SECONDS = 140.0  # for the kernels of one shape
READ, WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"


def run_child(
    command: Sequence[str], seconds: float, extra_env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's root with a time limit, its output captured.

    Raises:
        RuntimeError: if it takes longer, with the end of what it printed.
    """
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(extra_env or {})},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        raise RuntimeError(
            f"{' '.join(command[:4])} ... took over {seconds:.0f} s; printed last: {text[-300:]!r}"
        ) from None


def gpu_tests(context: Context) -> dict[str, Any]:
    """``pytest -m gpu tests``: counts, and the names and messages of what failed."""
    if find_spec("pytest") is None:
        raise SkippedError("pytest is not installed")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
        if find_spec("xdist"):  # most of the time goes into compiling kernels
            command += ["-n", "8"]
        child = run_child(command, context.remaining())
        if not report.exists():
            raise RuntimeError(f"pytest ended with {child.returncode}: {child.stdout[-500:]}")
        return {"exit_status": child.returncode, **read_junit(report.read_text())}


def read_junit(text: str) -> dict[str, Any]:
    """Counts and failures of a JUnit XML report."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    failed = {}
    for case in cases:
        for kind in ("failure", "error"):
            if (problem := case.find(kind)) is not None:
                name = f"{case.get('classname')}::{case.get('name')}"
                failed[name] = (problem.get("message") or "").partition("\n")[0][:300]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - skipped - len(failed),
        "skipped": skipped,
        "failures": failed,
    }


def compile_kernels(context: Context) -> dict[str, Any]:
    """Fill Triton's cache for all stage shapes, several processes at once.

    Nothing is measured: compiling dozens of kernels one after the other, between measurements,
    would take longer than all measurements.
    """

    def compile_for(name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.children", "compile", name]
        # on its own clock: the limit of the measurement cannot interrupt a thread
        child = run_child(command, min(COMPILE_SECONDS, context.remaining()))
        if child.returncode != 0:
            raise RuntimeError(child.stderr.strip()[-300:])

    failures = {}
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        jobs = {shape.name: pool.submit(compile_for, shape.name) for shape in STAGES}
        for name, job in jobs.items():
            if error := job.exception():
                failures[name] = str(error)
    return {"failures": failures}


def memory_checker(context: Context) -> dict[str, Any]:
    """compute-sanitizer's memcheck over a small block with ragged edges, forward and backward."""
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        raise SkippedError("compute-sanitizer is not on the PATH")
    command = [checker, "--tool", "memcheck", "--error-exitcode", str(CHECKER_FOUND)]
    command += [sys.executable, "-m", "benchmarks.children", "compile", "rehearsal-7"]
    # torch's allocator would hide accesses beyond a tensor inside its own large blocks
    child = run_child(command, context.remaining(), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    found = [line for line in child.stdout.splitlines() if line.startswith("=========")]
    if child.returncode not in (0, CHECKER_FOUND):
        raise SkippedError(f"compute-sanitizer ended with {child.returncode}: {found[-3:]}")
    failures = {"memcheck": " ".join(found[1:8])} if child.returncode == CHECKER_FOUND else {}
    return {"failures": failures}


def dram_bytes(shape: Shape) -> Measurement:
    """DRAM bytes of a fused forward over the bytes it must move, by Nsight Compute's counters."""

    def run(context: Context) -> dict[str, Any]:
        ncu = shutil.which("ncu")
        if ncu is None:
            raise SkippedError("ncu (Nsight Compute) is not on the PATH")
        command = [ncu, "--csv", "--print-units", "base", "--profile-from-start", "off"]
        # the clocks and the L2 as they are: two counters fit one pass, nothing is replayed
        command += ["--clock-control", "none", "--cache-control", "none"]
        command += ["--metrics", f"{READ},{WRITE}", sys.executable, "-m", "benchmarks.children"]
        command += ["forward", shape.name, "--calls", str(NCU_CALLS)]
        child = run_child(command, context.remaining())
        if child.returncode != 0:
            errors = [line for line in child.stdout.splitlines() if "==ERROR==" in line]
            reason = " ".join(errors) or child.stderr[-300:]
            raise SkippedError(f"ncu ended with {child.returncode}: {reason}")
        return over_ideal(read_ncu(child.stdout), io_bytes(shape, "fwd", "bf16"))

    return Measurement(f"DRAM bytes {shape.name}", run, seconds=90.0)


def read_ncu(text: str) -> dict[str, Any]:
    """Sum of both counters over all kernels in the CSV that ncu printed, per forward.

    Raises:
        RuntimeError: if there is no table with both counters in it.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    totals = {READ: 0.0, WRITE: 0.0}
    kernels = set()
    for row in csv.DictReader(lines):
        if row.get("Metric Name") in totals:
            totals[row["Metric Name"]] += float(row["Metric Value"].replace(",", ""))
            kernels.add((row.get("ID"), row.get("Kernel Name")))
    if not kernels or not all(totals.values()):
        raise RuntimeError(f"no DRAM counters in what ncu printed: {text[-500:]!r}")
    return {
        "read": totals[READ] / NCU_CALLS,
        "written": totals[WRITE] / NCU_CALLS,
        "kernels_per_call": len(kernels) / NCU_CALLS,
    }


def over_ideal(measured: dict[str, Any], ideal: int) -> dict[str, Any]:
    """Add the bytes that must move, and the ratio to them."""
    return {
        **measured,
        "ideal": ideal,
        "over_ideal": (measured["read"] + measured["written"]) / ideal,
    }


def first_call(context: Context) -> dict[str, Any]:
    """Seconds of a first call in a fresh process: Triton's cache empty, then filled by that one."""
    command = [sys.executable, "-m", "benchmarks.children", "first-call", "small-14"]
    result = {}
    with tempfile.TemporaryDirectory(prefix="smlp-triton-") as folder:
        for state in ("cold", "warm"):
            child = run_child(command, context.remaining(), {"TRITON_CACHE_DIR": folder})
            if child.returncode != 0:
                raise RuntimeError(f"{state}: {child.stderr[-500:]}")
            result[state] = json.loads(child.stdout.splitlines()[-1])
    return result

"""Measurements in separate processes: compiling, the tests, DRAM bytes by ncu, the first call."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.environment import ROOT
from benchmarks.recorder import Context, Measurement, OutOfTimeError, SkippedError
from benchmarks.roofline import io_bytes
from benchmarks.shapes import STAGES, Shape
from benchmarks.standalone import PROFILED_CALLS

FIRST_TESTS = "tests/smlp_kernels/test_mix.py"  # whether the forward is right at all
TESTS = "tests"
TEST_WORKERS = 8
READ, WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"


class ChildTimeoutError(RuntimeError):
    """A child took too long and was ended."""

    def __init__(self, command: Sequence[str], seconds: float, output: str) -> None:
        name, last = " ".join(command[:4]), output[-300:]
        super().__init__(f"{name} ... took over {seconds:.0f} s; printed last: {last!r}")
        self.output = output


def run_child(
    command: Sequence[str], seconds: float, extra_env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's root with a time limit, its output captured.

    Raises:
        ChildTimeoutError: if it takes longer, with what it printed.
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
        raise ChildTimeoutError(command, seconds, text) from None


def run_module(
    context: Context, module: str, *arguments: str, extra_env: Mapping[str, str] | None = None
) -> str:
    """The last line that ``python -m benchmarks.module`` prints; a RuntimeError if it fails."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    child = run_child(command, context.child_seconds(), extra_env)
    if child.returncode != 0:
        raise RuntimeError(f"ended with {child.returncode}: {child.stderr.strip()[-500:]}")
    return child.stdout.strip().rpartition("\n")[2]


def find_tool(name: str) -> str:
    """The path of one of NVIDIA's programs; a SkippedError where there is none."""
    if (path := shutil.which(name)) is None:
        raise SkippedError(f"{name} is not on the PATH")
    return path


def gpu_tests(context: Context) -> dict[str, Any]:
    """The forward's tests, then all that are marked ``gpu``: counts, and what failed.

    Those marked ``large`` run alone, because they need the memory that other processes would hold.
    Tests that are skipped all the same are reported with the reason.
    """
    if find_spec("pytest") is None:
        raise SkippedError("pytest is not installed")
    found = context.so_far
    found |= {"passed": 0, "skipped": 0, "failures": {}, "skips": {}}
    for which, workers, *paths in (
        ("not large", TEST_WORKERS, FIRST_TESTS),
        ("gpu and large", 0, TESTS),
        ("gpu and not large", TEST_WORKERS, TESTS, f"--deselect={FIRST_TESTS}"),
    ):
        part = _run_tests(context, which, workers, paths)
        for count in ("passed", "skipped"):
            found[count] += part[count]
        for messages in ("failures", "skips"):
            found[messages].update(part[messages])
    return found


def _run_tests(context: Context, which: str, workers: int, paths: Sequence[str]) -> dict[str, Any]:
    """The tests below ``paths`` that a marker expression chooses; see :func:`read_junit`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", which, *paths, "-v"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["--continue-on-collection-errors"]  # a package may be missing for other tests
        if workers and find_spec("xdist"):  # most of the time goes into compiling kernels
            command += ["-n", str(workers)]
        try:
            child = run_child(command, context.child_seconds())
        except ChildTimeoutError as error:
            outcomes = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", error.output)
            context.so_far["cut off"] = {which: Counter(outcomes)}
            raise OutOfTimeError(f"tests marked {which} took too long") from error
        if not report.exists():
            raise RuntimeError(f"pytest ended with {child.returncode}: {child.stdout[-500:]}")
        found = read_junit(report.read_text())
        if child.returncode not in (0, 1):  # 1: a test failed
            found["failures"]["pytest"] = f"ended with {child.returncode}: {child.stdout[-300:]}"
        return found


def read_junit(text: str) -> dict[str, Any]:
    """Counts of a JUnit XML report, and the messages of what failed and of what was skipped."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    messages: dict[str, dict[str, str]] = {"failure": {}, "error": {}, "skipped": {}}
    for case in cases:
        for kind, by_name in messages.items():
            if (problem := case.find(kind)) is not None:
                name = f"{case.get('classname')}::{case.get('name')}"
                by_name[name] = (problem.get("message") or "").partition("\n")[0][:300]
    failed, skipped = messages["failure"] | messages["error"], messages["skipped"]
    return {
        "passed": len(cases) - len(skipped) - len(failed),
        "skipped": len(skipped),
        "failures": failed,
        "skips": skipped,
    }


def compile_kernels(context: Context) -> dict[str, Any]:
    """Fill Triton's cache for all stage shapes, several processes at once.

    Nothing is measured: compiling dozens of kernels one after the other, between measurements,
    would take longer than all measurements.
    """
    failures = context.so_far.setdefault("failures", {})
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        # each on its own clock: the limit of the measurement cannot interrupt a thread
        compile_for = partial(pool.submit, run_module, context, "standalone", "compile")
        jobs = {shape.name: compile_for(shape.name) for shape in STAGES}
        for name, job in jobs.items():
            if error := job.exception():
                failures[name] = str(error)
    return context.so_far


def memory_checker(context: Context) -> dict[str, Any]:
    """compute-sanitizer's memcheck over a small block with ragged edges, forward and backward."""
    # torch's allocator would hide accesses beyond a tensor inside its own large blocks
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return run_checker(context, "memcheck", "standalone", "compile", "rehearsal-7", env=no_cache)


def run_checker(
    context: Context, tool: str, module: str, *arguments: str, env: Mapping[str, str]
) -> dict[str, Any]:
    """The verdict of a tool of compute-sanitizer on ``python -m benchmarks.module``."""
    command = [find_tool("compute-sanitizer"), "--tool", tool]
    command += [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    child = run_child(command, context.child_seconds(), env)
    return read_checker(child.stdout, child.returncode)


def read_checker(text: str, status: int) -> dict[str, Any]:
    """The verdict of compute-sanitizer: its summary, not its exit status.

    It ends with the status of the program where that dies, as it does of what was found.

    Raises:
        SkippedError: if it gave no verdict.
        RuntimeError: if it found nothing, but the program failed.
    """
    said = [line for line in text.splitlines() if line.startswith("=========")]
    errors = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
    if not errors:
        raise SkippedError(f"compute-sanitizer ended with {status}, no summary: {said[-3:]}")
    if any(map(int, errors)):
        return {"failures": {"compute-sanitizer": " ".join(said[1:8])}}
    if status != 0:
        raise RuntimeError(f"no errors found, but the program ended with {status}: {text[-300:]!r}")
    return {"failures": {}}


def dram_bytes(shape: Shape) -> Measurement:
    """DRAM bytes of a fused forward over the bytes it must move, by Nsight Compute's counters."""

    def run(context: Context) -> dict[str, Any]:
        command = [find_tool("ncu"), "--csv", "--print-units", "base"]
        command += ["--profile-from-start", "off"]
        # the clocks and the L2 as they are: two counters fit one pass, nothing is replayed
        command += ["--clock-control", "none", "--cache-control", "none"]
        command += ["--metrics", f"{READ},{WRITE}", sys.executable, "-m", "benchmarks.standalone"]
        command += ["forward", shape.name]
        child = run_child(command, context.child_seconds())
        if child.returncode != 0:
            errors = [line for line in child.stdout.splitlines() if "==ERROR==" in line]
            reason = " ".join(errors) or child.stderr[-300:]
            raise SkippedError(f"ncu ended with {child.returncode}: {reason}")
        found, ideal = read_ncu(child.stdout), io_bytes(shape, "fwd", "bf16")
        moved = found["read"] + found["written"]
        return {**found, "ideal": ideal, "over_ideal": moved / ideal}

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
        "read": totals[READ] / PROFILED_CALLS,
        "written": totals[WRITE] / PROFILED_CALLS,
        "kernels_per_call": len(kernels) / PROFILED_CALLS,
    }


def first_call(context: Context) -> dict[str, Any]:
    """Seconds of a first call in a fresh process: Triton's cache empty, then filled by that one."""
    job = ("standalone", "first-call", "small-14")
    with tempfile.TemporaryDirectory(prefix="smlp-triton-") as folder:
        for state in ("cold", "warm"):
            printed = run_module(context, *job, extra_env={"TRITON_CACHE_DIR": folder})
            context.so_far[state] = json.loads(printed)
    return context.so_far

"""A step of the GPU day: a command, run within its time, and results read from what it printed.

A reader takes the output of a step and the file that the step was to write; it raises a ValueError
or an OSError if there are no results.
"""

import csv
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired
from typing import IO, Any

from benchmarks.environment import ROOT

Reader = Callable[[str, Path], dict[str, Any]]

JSON = "{json}"  # in a command: the file that it is to write
GRACE_SECONDS = 15.0  # for a step that is stopped to write down what it has
# whether the forward is right at all, and a kernel that has not run on a GPU yet
FIRST_TESTS = ("tests/smlp_kernels/test_mix.py", "tests/smlp_kernels/test_narrow.py")
ALL_TESTS = "tests"
WORKERS = "8"  # for tests: most of their time goes into compiling kernels
DRAM_COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def objects(printed: str, _: Path) -> dict[str, Any]:
    """JSON objects, one a line among others, taken together."""
    found: dict[str, Any] = {}
    for line in printed.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if not found:
        raise ValueError("there is no JSON in what it printed")
    return found


def rows(_: str, file: Path) -> dict[str, Any]:
    """Rows with a GPU time in the JSON of ``pytest benchmarks``, and the ceilings."""
    data = json.loads(file.read_text())
    found = [entry["extra_info"] for entry in data["benchmarks"]]
    found = [row for row in found if row.get("gpu_us") is not None]
    if not found:
        raise ValueError("nothing was timed")
    return {"ceilings": data["ceilings"], "rows": found}


def outcomes(printed: str, _: Path) -> dict[str, Any]:
    """Counts of tests from pytest's last line, and why some were skipped."""
    last = printed.strip().rpartition("\n")[2]
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    skips = re.findall(r"(?m)^SKIPPED .*", printed)
    if not counts.get("passed"):
        raise ValueError("; ".join(["no test passed", *skips]))
    return {**counts, "skips": skips}


def verdict(printed: str, _: Path) -> dict[str, Any]:
    """The summary of compute-sanitizer, whose exit status may be that of the program it watched."""
    errors = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", printed)
    if not errors or any(map(int, errors)):
        raise ValueError(f"compute-sanitizer: expected a summary of 0 errors, got {errors or None}")
    return {"errors": 0}


def dram_bytes(printed: str, _: Path) -> dict[str, Any]:
    """Bytes that a call moved, by ncu's counters of all kernels, and over those that it must."""
    told = objects(printed, _)  # by the program: calls, and the bytes that one must move
    totals = dict.fromkeys(DRAM_COUNTERS, 0.0)
    for row in csv.DictReader(line for line in printed.splitlines() if line.startswith('"')):
        if row.get("Metric Name") in totals:
            totals[row["Metric Name"]] += float(row["Metric Value"].replace(",", ""))
    if not all(totals.values()):
        raise ValueError("no DRAM counters in what ncu printed")
    read, written = (total / told["calls"] for total in totals.values())
    return {"read": read, "written": written, "over_ideal": (read + written) / told["ideal"]}


def tables(printed: str, _: Path) -> dict[str, Any]:
    """How many tables of Nsight Compute there are to read, one for each kernel and section."""
    if not (count := printed.count("Section: ")):
        raise ValueError("no tables in what ncu printed")
    return {"tables": count}


def problems(printed: str) -> list[str]:
    """Lines that say what went wrong, or the last one."""
    lines = re.findall(r"(?m)^(?:FAILED|ERROR|==ERROR==|========= +(?!COMPUTE)).*", printed)
    return lines[:20] or printed.strip("= \n").splitlines()[-1:]


@dataclass(frozen=True)
class Step:
    """A module of Python's to run.

    Attributes:
        name: of its entry in the results, and of its files.
        arguments: the module's name first; JSON stands for a file to write.
        seconds: it is stopped after that.
        read: makes results of what it printed and wrote.
        under: a program that watches it, with its own arguments.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float = 90.0
    read: Reader = objects
    under: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return [*self.under, sys.executable, "-m", *self.arguments]

    def run(self, folder: Path, seconds: float) -> dict[str, Any]:
        """Run it in at most ``seconds``; its entry in the results, with what it measured."""
        folder = folder.resolve()  # commands run in the project's root
        printed, file = folder / f"{self.name}.txt", folder / f"{self.name}.json"
        file.unlink(missing_ok=True)
        entry: dict[str, Any] = {
            "status": "measured",
            "command": shlex.join(self.command),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        start = time.monotonic()
        with printed.open("wb") as output:
            problem = execute([w.replace(JSON, str(file)) for w in self.command], output, seconds)
        entry["seconds"] = round(time.monotonic() - start, 1)
        text = printed.read_text(errors="replace")
        try:
            entry["result"] = self.read(text, file)
        except (OSError, ValueError) as error:
            problem = problem or f"{type(error).__name__}: {error}"
        if problem:
            entry["status"] = "failed"
            entry["reason"] = "; ".join([problem, *problems(text)])
        return entry


def execute(command: Sequence[str], output: IO[bytes], seconds: float) -> str | None:
    """Run a command in the project's root; why it did not succeed, or None.

    It is interrupted first when time is up: pytest then reports what it has. Nothing that it
    started outlives it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background, SIGINT may be ignored
        signal.signal(number, signal.default_int_handler)
    try:
        child = Popen(command, cwd=ROOT, stdout=output, stderr=STDOUT, start_new_session=True)
    except FileNotFoundError:
        return f"{command[0]} is not on the PATH"
    try:
        status = child.wait(seconds)
        return f"ended with {status}" if status else None
    except TimeoutExpired:
        child.send_signal(signal.SIGINT)
        with suppress(TimeoutExpired):
            child.wait(GRACE_SECONDS)
        return f"stopped after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def tests(name: str, which: str, *arguments: str, parallel: bool = True) -> Step:
    """The tests that a marker expression chooses."""
    options = ["-v", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", which]
    if parallel and find_spec("xdist"):
        options += ["-n", WORKERS]
    wide = ("env", "COLUMNS=300")  # or pytest cuts its reasons off
    return Step(name, ("pytest", *options, *arguments), 300, outcomes, wide)


def checker(tool: str, module: str, *arguments: str) -> Step:
    """A tool of compute-sanitizer that watches a module."""
    # torch's allocator would hide accesses beyond a tensor inside its own large blocks
    under = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool)
    name = "-".join([tool, module.rpartition(".")[2], *arguments[-1:]])
    return Step(name, (module, *arguments), 120, verdict, under)


def profiled(name: str, job: str, shape: str, read: Reader, *options: str) -> Step:
    """Nsight Compute's view of the profiled calls, with clocks and the L2 as they are."""
    quiet = ("--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off")
    command = ("benchmarks.standalone", job, shape)
    return Step(f"{name}-{shape}", command, read=read, under=("ncu", *quiet, *options))


def dram(shape: str) -> Step:
    """DRAM bytes of a fused forward; two counters fit one pass, so that nothing is replayed."""
    counters = ("--csv", "--print-units", "base", "--metrics", ",".join(DRAM_COUNTERS))
    return profiled("dram", "forward", shape, dram_bytes, *counters)


def limits(shape: str) -> Step:
    """What limits each kernel of a training step: tables to read in the file of what it printed."""
    options = ("--launch-count", "30", "--set", "full", "--print-details", "all")
    return profiled("limits", "training", shape, tables, *options)


def block(
    name: str,
    shapes: str,
    providers: str,
    dtype: str = "bf16",
    layout: str = "channels_last",
    seconds: float = 90.0,
) -> Step:
    """The block by ``pytest benchmarks``, forward alone and with its backward."""
    options = ["-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={JSON}"]
    options += [f"--shapes={shapes}", f"--providers={providers}", "--passes=inference,fwd+bwd"]
    options += [f"--dtypes={dtype}", f"--layouts={layout}"]
    return Step(name, ("pytest", "benchmarks", *options), seconds, rows)

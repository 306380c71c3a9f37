"""Everything there is to measure on a GPU, in calls of under ten minutes::

    python -m benchmarks.gpu_report --out bench_out/report [--part 1|2] [--minutes 8.5]

Part 1 checks the kernels and measures all but torch.compile, part 2 what takes torch.compile's
minutes of tuning, in several calls: each says how many are left at most. Each result is written
down as it comes; a call with the same folder goes on where the former one stopped. Without a GPU
everything is skipped with the reason. A kernel that leaves the GPU unusable costs one measurement:
the rest is done by a new process.

Writes into the folder: ``results.json`` (every measurement), ``report.json`` (the stages' rows,
for ``benchmarks.plot`` and ``benchmarks.readme_table``), ``table.txt``, ``report.md`` and
``share_of_floor.png``.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, measure_block, measure_process, plot, targets
from benchmarks.ceilings import describe, measure_ceilings
from benchmarks.children import VARIANTS
from benchmarks.measure_block import timed
from benchmarks.measure_network import network
from benchmarks.products import products
from benchmarks.recorder import (
    RESULTS,
    Context,
    DeviceLostError,
    Measurement,
    Recorder,
    details,
)
from benchmarks.roofline import Ceilings
from benchmarks.rows import compare
from benchmarks.shapes import DEMO, GROUPS, GROWTH, STAGES, Shape
from benchmarks.summary import summary_lines

QUICK = ("eager_nchw", "eager_nhwc", "handwritten", "fused")
COMPILED = ("compiled", "handwritten_compiled", "fused")
BOTH = ("inference", "fwd+bwd")
FORWARD = ("inference",)
TUNING_SECONDS = 120.0  # for one measurement with torch.compile in it


def part_1() -> list[Measurement]:
    """Checks first, then what the targets name, then the other types and layouts."""
    bf16, *others = VARIANTS
    return [
        Measurement("compile kernels", measure_process.compile_kernels, seconds=150.0),
        Measurement("tests on the GPU", measure_process.gpu_tests, seconds=180.0),
        *(measure_block.chunks(shape) for shape in STAGES),
        *(_stage(shape, BOTH, QUICK, *bf16) for shape in STAGES),
        *(measure_process.dram_bytes(shape) for shape in targets.DRAM_SHAPES),
        *(measure_block.memory(shape) for shape in STAGES),
        Measurement("host time", measure_block.host),
        Measurement("graph replay", measure_block.graph_replay),
        Measurement("first call", measure_process.first_call, seconds=120.0),
        Measurement("network", network, seconds=90.0),
        timed("demo", DEMO, FORWARD, QUICK, "fp32", "nchw"),
        *(timed(s.name, s, FORWARD, ("eager_nhwc", "fused")) for s in GROWTH),
        *(_stage(shape, BOTH, QUICK, *variant) for variant in others for shape in STAGES),
        Measurement("products alone", products),
        Measurement("memory checker", measure_process.memory_checker, seconds=90.0),
    ]


def part_2() -> list[Measurement]:
    """torch.compile: one network's stages in all that is compared with it, then the others."""
    bf16, tf32, _, nchw = VARIANTS
    tuned = partial(_stage, names=COMPILED, seconds=TUNING_SECONDS)
    small = GROUPS["small"]
    rest = [shape for shape in STAGES if shape not in small]
    return [
        *(tuned(s, FORWARD, dtype=bf16[0], layout=bf16[1]) for s in small),
        Measurement("network compiled", partial(network, compiled=True), seconds=240.0),
        *(tuned(s, ("fwd+bwd",), dtype=bf16[0], layout=bf16[1]) for s in small),
        timed("demo compiled", DEMO, FORWARD, COMPILED, "fp32", "nchw", TUNING_SECONDS),
        *(tuned(s, FORWARD, dtype=tf32[0], layout=tf32[1]) for s in small),
        *(tuned(s, FORWARD, dtype=nchw[0], layout=nchw[1]) for s in small),
        *(tuned(s, FORWARD, dtype=bf16[0], layout=bf16[1]) for s in rest),
        *(tuned(s, ("fwd+bwd",), dtype=bf16[0], layout=bf16[1]) for s in rest),
    ]


def _stage(
    shape: Shape,
    passes: Sequence[str],
    names: Sequence[str],
    dtype: str,
    layout: str,
    seconds: float = 60.0,
) -> Measurement:
    kind = "compiled " if names == COMPILED else ""
    name = f"{kind}{shape.name} {dtype} {layout} {' '.join(passes)}"
    return timed(name, shape, passes, names, dtype, layout, seconds)


def all_rows(recorder: Recorder) -> list[dict[str, Any]]:
    """Rows of all measurements, those of one group next to each other and compared anew.

    The fused block is timed beside the quick providers and again beside the compiled ones: its
    first row stays.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in recorder.rows():
        groups.setdefault(row["group"], {}).setdefault(row["provider"], row)
    return [row for group in groups.values() for row in compare(list(group.values()))]


def other_lines(recorder: Recorder) -> list[str]:
    """What was measured that is not in rows, one line each; then what is not measured, and why."""
    entries = recorder.entries.items()
    found = [
        f"{name}: {json.dumps(entry['result'])}"
        for name, entry in entries
        if recorder.measured(name) and "rows" not in entry["result"]
    ]
    missing = [
        " ".join([f"{name}: {entry['status']}: {entry['reason']}", *details(entry)])
        for name, entry in entries
        if not recorder.measured(name)
    ]
    return found + missing


def calls_needed(measurements: Sequence[Measurement], minutes: float) -> int:
    """How many calls of this length do them all, each taking as long as it may."""
    calls, left = 0, 0.0
    for measurement in measurements:
        if measurement.seconds > left:
            calls, left = calls + 1, 60 * minutes
        left -= measurement.seconds
    return calls


def plan(measurements: Sequence[Measurement], recorder: Recorder, minutes: float) -> str:
    """A line on what is left to be measured."""
    left = recorder.left(measurements)
    return (
        f"{len(left)} of {len(measurements)} measurements are left: at most "
        f"{sum(one.seconds for one in left) / 60:.0f} minutes, "
        f"{calls_needed(left, minutes)} calls of {minutes:g} minutes"
    )


def conclude(recorder: Recorder, folder: Path, command: str) -> None:
    """Write and print what the recorded measurements amount to."""
    rows = all_rows(recorder)
    of_stages = [row for row in rows if row["shape"] in {shape.name for shape in STAGES}]
    judged = targets.verdicts(rows, recorder.result)
    measured = [entry for entry in recorder.entries.values() if entry["status"] == "measured"]
    last = measured[-1] if measured else {}
    facts = last.get("environment", environment.describe())
    ceilings = next((e["ceilings"] for e in reversed(measured) if e["ceilings"]), None)
    source = folder / "report.json"
    data = {"environment": facts, "ceilings": ceilings, "rows": of_stages, "command": command}
    source.write_text(json.dumps(data, indent=1) + "\n")

    head = [", ".join(f"{name} {value}" for name, value in facts.items())]
    commits = sorted({str(entry["environment"]["commit"]) for entry in measured})
    if len(commits) > 1:
        head.append(f"MEASURED AT DIFFERENT COMMITS: {', '.join(commits)}")
    if ceilings:
        head.append(describe(Ceilings(**ceilings)))
    elif not torch.cuda.is_available():
        head.append(environment.NOT_PERFORMANCE)
    text = [*head, *summary_lines(rows), "", *other_lines(recorder), "", *targets.lines(judged)]
    (folder / "table.txt").write_text("\n".join(text) + "\n")
    print("\n".join(text))

    page = ["# Report", "", *(f"{line}  " for line in head), "", *targets.markdown(judged), ""]
    try:
        run = plot.load(source)
    except plot.NothingMeasuredError as reason:
        print(reason)
    else:
        page.append(plot.markdown(run, command))
        try:
            plot.draw(run, folder / "share_of_floor.png")
        except ImportError as error:
            print(f"no picture: {error}")
    (folder / "report.md").write_text("\n".join(page) + "\n")
    print("written:", *sorted(str(path) for path in folder.iterdir()))


def minutes(text: str) -> float:
    """The value of ``--minutes``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text!r}")
    return value


def report_folder(text: str) -> Path:
    """The value of ``--out``: made if need be, and never one with other things in it."""
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RESULTS).exists():
        raise argparse.ArgumentTypeError(
            f"expected a new or empty folder, or one of an earlier call with a {RESULTS}, got "
            f"{text!r} with other things in it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from None
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=report_folder,
        required=True,
        help="folder of the results: a new or empty one, or that of an earlier call",
    )
    parser.add_argument("--part", type=int, choices=(1, 2), help="half of it; default both")
    parser.add_argument(
        "--minutes",
        type=minutes,
        default=8.5,
        help="when to start nothing more; default 8.5, so that the whole call takes less than 10",
    )
    parser.add_argument("--no-retry", action="store_true", help="leave out what failed before")
    arguments = parser.parse_args()
    context = Context(time.monotonic() + 60 * arguments.minutes)
    recorder = Recorder(arguments.out)
    try:
        context.ceilings = measure_ceilings()
        print(describe(context.ceilings), flush=True)
    except RuntimeError as reason:
        print(f"skipped: {reason}")
    parts = {1: part_1, 2: part_2}
    chosen = (arguments.part,) if arguments.part else tuple(parts)
    measurements = [measurement for part in chosen for measurement in parts[part]()]
    if context.ceilings:
        print(plan(measurements, recorder, arguments.minutes), flush=True)
    command = ["-m", "benchmarks.gpu_report", "--out", str(arguments.out)]
    if arguments.part:
        command += ["--part", str(arguments.part)]
    say = partial(print, flush=True)
    try:
        recorder.run(measurements, context, say, retry=not arguments.no_retry)
    except DeviceLostError as error:
        say(f"{error} left the GPU unusable for this process; another one goes on")
        left = max(context.remaining() / 60, 0.001)  # enough for the conclusion
        command += ["--minutes", f"{left:.3f}", "--no-retry"]
        os.execv(sys.executable, [sys.executable, *command])
    conclude(recorder, arguments.out, " ".join(["python", *command]))
    if context.ceilings:
        say(plan(measurements, recorder, arguments.minutes))


if __name__ == "__main__":
    main()

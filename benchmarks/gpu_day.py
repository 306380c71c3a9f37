"""Everything there is to measure on a GPU, the most telling first, in calls of under ten minutes::

    python -m benchmarks.gpu_day --out bench_out/gpu-day [--minutes 8.5]

The tests, chunk sizes, every stage next to what PyTorch offers, and how the kernels use the machine
come in the first call; other types and layouts and torch.compile's minutes of tuning in later ones.
Each result is written down as it comes; a call with the same folder continues where the former one
stopped and says how many are left at most. Without a GPU everything is skipped with the reason. A
kernel that leaves the GPU unusable costs one measurement: a new process does the rest.

Writes into the folder: ``results.json`` (every measurement), ``report.md`` (tables and verdicts),
``readme.md`` (the README's section) and ``share_of_floor.png``.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    environment,
    measure_block,
    measure_hopper,
    measure_process,
    plot,
    targets,
)
from benchmarks.measure_block import timed
from benchmarks.measure_network import network
from benchmarks.recorder import RESULTS, Context, DeviceLostError, Measurement, Recorder, details
from benchmarks.report import NOTHING, Report, readme_text, tables
from benchmarks.roofline import Ceilings, measure_ceilings
from benchmarks.rows import with_ratios
from benchmarks.shapes import DEMO, GROUPS, GROWTH, STAGES
from benchmarks.standalone import VARIANTS
from smlp.machine import in_words
from smlp.tables import markdown_table

QUICK = ("eager_nchw", "eager_nhwc", "handwritten", "fused")
COMPILED = ("compiled", "handwritten_compiled", "fused")
BOTH = ("inference", "fwd+bwd")
FORWARD = ("inference",)
TUNING_SECONDS = 120.0  # for one measurement with torch.compile in it


def measurements() -> list[Measurement]:
    """All of them, in the order in which they are made.

    Whether the kernels are right, how fast they are and why, then other types and layouts.
    """
    bf16, *others = VARIANTS
    return [
        Measurement("tests on the GPU", measure_process.gpu_tests, seconds=180.0),
        Measurement("compile kernels", measure_process.compile_kernels, seconds=150.0),
        *(measure_block.chunks(shape) for shape in STAGES),
        *(timed(shape, BOTH, QUICK, *bf16) for shape in STAGES),
        Measurement("products alone", measure_block.products),
        *(measure_process.dram_bytes(shape) for shape in targets.DRAM_SHAPES),
        Measurement("host time", measure_block.host),
        Measurement("graph replay", measure_block.graph_replay),
        *measure_hopper.measurements(),
        Measurement("network", network, seconds=90.0),
        *(measure_block.memory(shape) for shape in STAGES),
        Measurement("first call", measure_process.first_call, seconds=120.0),
        timed(DEMO, FORWARD, QUICK, "fp32", "nchw"),
        *(timed(s, FORWARD, ("eager_nhwc", "fused")) for s in GROWTH),
        *(timed(shape, BOTH, QUICK, *variant) for variant in others for shape in STAGES),
        Measurement("memory checker", measure_process.memory_checker, seconds=90.0),
        *compiled_measurements(),
    ]


def compiled_measurements() -> list[Measurement]:
    """torch.compile: one network's stages in all that is compared with it, then the others."""
    bf16, tf32, _, nchw = VARIANTS
    small = GROUPS["small"]
    rest = [shape for shape in STAGES if shape not in small]
    first, *others = (
        [timed(shape, passes, COMPILED, *variant, TUNING_SECONDS) for shape in shapes]
        for shapes, passes, variant in (
            (small, FORWARD, bf16),
            (small, ("fwd+bwd",), bf16),
            ([DEMO], FORWARD, ("fp32", "nchw")),
            (small, FORWARD, tf32),
            (small, FORWARD, nchw),
            (rest, FORWARD, bf16),
            (rest, ("fwd+bwd",), bf16),
        )
    )
    compiled = Measurement("network compiled", partial(network, compiled=True), seconds=240.0)
    return [*first, compiled, *(one for group in others for one in group)]


def all_rows(recorder: Recorder) -> list[dict[str, Any]]:
    """Rows of all measurements, those of one group next to each other and compared again.

    The fused block is timed with the quick providers and again with the compiled ones: its
    first row stays.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in recorder.rows():
        groups.setdefault(row["group"], {}).setdefault(row["provider"], row)
    return [row for group in groups.values() for row in with_ratios(list(group.values()))]


def chunk_tables(recorder: Recorder) -> list[str]:
    """GPU microseconds of the fused block by the scratch memory that a chunk of images takes."""
    text = []
    sizes = [f"{megabytes} MB" for megabytes in measure_block.CHUNK_MB]
    for pass_ in measure_block.CHUNK_PASSES:
        lines = [
            (str(shape), *(f"{found[size][pass_]['us']:.1f}" for size in sizes))
            for shape in STAGES
            if (found := recorder.result(f"chunks {shape.name}"))
        ]
        if lines:
            text += [f"**{pass_}**, fused, by the size of a chunk", ""]
            text += [*markdown_table(("[B, C, H, W]", *sizes), lines), ""]
    return text


def other_lines(recorder: Recorder) -> list[str]:
    """List what was measured that is not in rows; then what is not measured, and why."""
    found, missing = [], []
    for name, entry in recorder.entries.items():
        if not recorder.measured(name):
            head = f"{name}: {entry['status']}: {entry['reason']}"
            missing.append(" ".join([head, *details(entry)]))
        elif "rows" not in entry["result"] and not name.startswith("chunks "):
            found.append(f"{name}: {json.dumps(entry['result'])}")
    return found + missing


def plan(wanted: Sequence[Measurement], recorder: Recorder) -> str:
    """A line on what is left to be measured."""
    left = [measurement for measurement in wanted if not recorder.measured(measurement.name)]
    minutes = sum(one.seconds for one in left) / 60
    return f"{len(left)} of {len(wanted)} measurements are left: at most {minutes:.0f} minutes"


def conclude(recorder: Recorder, folder: Path, command: str) -> None:
    """Write and print what the recorded measurements amount to."""
    rows = all_rows(recorder)
    judged = targets.table(targets.verdicts(rows, recorder.result))
    measured = [entry for entry in recorder.entries.values() if entry["status"] == "measured"]
    facts = measured[-1]["environment"] if measured else environment.describe()
    ceilings = next((e["ceilings"] for e in reversed(measured) if e["ceilings"]), None)

    text = ["# GPU day", "", f"`{command}`: {in_words(facts)}"]
    commits = sorted({str(entry["environment"]["commit"]) for entry in measured})
    if len(commits) > 1:
        text += ["", f"MEASURED AT DIFFERENT COMMITS: {', '.join(commits)}"]
    report, readme = None, NOTHING
    if not ceilings:
        text += ["", environment.NOT_PERFORMANCE]
    else:
        rates, stages = Ceilings(**ceilings), {shape.name for shape in STAGES}
        report, others = (
            Report([row for row in rows if (row["shape"] in stages) is kept], rates, facts)
            for kept in (True, False)
        )
        text += ["", str(rates), "", *tables(report.series()), *tables(others.series())]
        text += chunk_tables(recorder)
        readme = readme_text(report, judged) if report.rows else NOTHING
    (folder / "readme.md").write_text(f"{readme}\n")
    text += ["", *judged, "", *(f"- {line}" for line in other_lines(recorder))]
    (folder / "report.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    if report and report.rows:
        try:
            plot.draw(report, folder / "share_of_floor.png")
        except ImportError as error:
            print(f"no picture: {error}")
    print("written:", *sorted(str(path) for path in folder.iterdir()))


def minutes(text: str) -> float:
    """The value of ``--minutes``."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text!r}")


def pattern(text: str) -> re.Pattern[str]:
    """The value of ``--only``."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a pattern, got {text!r}: {error}") from None


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
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from None
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "folder of the results: a new or empty one, or that of an earlier call"
    parser.add_argument("--out", type=report_folder, required=True, help=text)
    text = "when to start nothing more; default 8.5, so that the whole call takes at most 9.5"
    parser.add_argument("--minutes", type=minutes, default=8.5, help=text)
    text = "regular expression: leave out all measurements whose names it does not match"
    parser.add_argument("--only", type=pattern, default="", help=text)
    parser.add_argument("--no-retry", action="store_true", help="leave out what failed before")
    arguments = parser.parse_args()
    context = Context(time.monotonic() + 60 * arguments.minutes)
    recorder = Recorder(arguments.out)
    try:
        context.ceilings = measure_ceilings()
        print(context.ceilings, flush=True)
    except RuntimeError as reason:
        print(f"skipped: {reason}")
    wanted = [one for one in measurements() if arguments.only.search(one.name)]
    if context.ceilings:
        print(plan(wanted, recorder), flush=True)
    command = ["-m", "benchmarks.gpu_day", "--out", str(arguments.out)]
    if arguments.only.pattern:
        command += ["--only", arguments.only.pattern]
    say = partial(print, flush=True)
    try:
        recorder.run(wanted, context, say, retry=not arguments.no_retry)
    except DeviceLostError as error:
        say(f"{error} left the GPU unusable for this process; another one continues")
        left = max(context.remaining() / 60, 0.001)  # enough for the conclusion
        command += ["--minutes", f"{left:.3f}", "--no-retry"]
        os.execv(sys.executable, [sys.executable, *command])
    conclude(recorder, arguments.out, " ".join(["python", *command]))
    if context.ceilings:
        say(plan(wanted, recorder))


if __name__ == "__main__":
    main()

"""Measure all that needs a GPU, the most telling first, in calls of under ten minutes.

    python -m benchmarks.gpu_day --out bench_out/gpu-day [--minutes 9] [--only PATTERN]

Every step is a process, so that one that hangs or leaves the GPU unusable costs nothing but itself.
Its results are saved when it ends, even if it had to be stopped; a call with the same folder
continues where the previous one stopped. Without a GPU this lists the steps and runs none.

Writes into the folder: ``results.json`` (all results), ``report.md`` (all tables),
``share_of_floor.png``, and the output of each step.
"""

import argparse
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, report
from benchmarks.roofline import Ceilings
from benchmarks.shapes import STAGES, VARIANTS, WIDTHS
from benchmarks.steps import ALL_TESTS, FIRST_TESTS, Step, block, checker, dram, limits, tests
from smlp.files import write_atomically
from smlp.machine import in_words

RESULTS = "results.json"
MINUTES = 9.0
LEAST_SECONDS = 10.0  # with less left than this nothing more is started
SMALL, SMALL_NARROW = "rehearsal-14", "rehearsal-8x32"
QUICK = "eager_nchw,eager_nhwc,handwritten,fused"


def steps() -> list[Step]:
    """All of them, in the order in which they are taken.

    Whether the kernels are right, how fast they are and why, then other types and layouts, and
    torch.compile with its minutes of tuning last.
    """
    _, *others = VARIANTS
    jobs, hopper = "benchmarks.standalone", "benchmarks.hopper"
    return [
        tests("tests-first", "not large", *FIRST_TESTS),
        tests("tests-large", "gpu and large", ALL_TESTS, parallel=False),  # need the memory
        Step("compile", (jobs, "compile-stages"), 150),
        *(block(name, name, QUICK) for name in WIDTHS),
        Step("hopper", (hopper,)),
        *map(dram, ("small-28", "small-56")),  # x and y of neither fit the L2
        *map(limits, ("small-14", "small-28", "small-56")),
        block("host", "host", "eager_nhwc,handwritten,fused"),
        Step("network", ("benchmarks.network",), 120),
        tests("tests", "gpu and not large", ALL_TESTS, *(f"--deselect={t}" for t in FIRST_TESTS)),
        *(
            checker(tool, *of)
            for of in ((jobs, "compile", SMALL), (jobs, "compile", SMALL_NARROW), (hopper, "once"))
            for tool in ("racecheck", "memcheck")
        ),
        Step("first-calls", (jobs, "first-calls", "small-14"), 120),
        block("demo", "demo-224", QUICK, "fp32", "nchw"),
        block("others", "others", QUICK, seconds=180),
        *(block("-".join([n, *variant]), n, QUICK, *variant) for variant in others for n in WIDTHS),
        *(block(f"compiled-{s.name}", s.name, "all", seconds=240) for s in STAGES),
        Step("network-compiled", ("benchmarks.network", "--compiled"), 240),
        *(block("-".join(["compiled", *v]), "small-14", "all", *v, seconds=240) for v in others),
    ]


def results_in(folder: Path) -> dict[str, Any]:
    """Facts of the machine and entries of steps: those of an earlier call, or none yet.

    Raises:
        OSError: if there can be no such folder.
        ValueError: if it holds other things, or results of another GPU or commit, with which these
            must not be mixed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = environment.describe()
    if not (folder / RESULTS).exists():
        if any(folder.iterdir()):
            raise ValueError(f"expected a new folder or one with a {RESULTS}, got {folder}")
        return {"environment": facts, "steps": {}}
    results: dict[str, Any] = json.loads((folder / RESULTS).read_text())
    for name in ("gpu", "commit"):
        here, there = facts.get(name), results["environment"].get(name)
        if here != there:
            raise ValueError(f"{folder} is of {name} {there}, not {here}: name a new folder")
    return results


def save(results: dict[str, Any], folder: Path) -> None:
    write_atomically(folder / RESULTS, json.dumps(results, indent=1).encode())


def left_of(wanted: Sequence[Step], entries: dict[str, Any]) -> list[Step]:
    """Steps that are not measured, those that were never tried first."""
    left = [one for one in wanted if entries.get(one.name, {}).get("status") != "measured"]
    return sorted(left, key=lambda step: step.name in entries)


def rows_of(entries: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of the block; each group from one step alone, the last that was measured."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(entries.values(), key=lambda entry: entry["status"] == "measured"):
        rows = entry.get("result", {}).get("rows", [])
        groups |= {group: list(of) for group, of in groupby(rows, itemgetter("group"))}
    return [row for group in groups.values() for row in group]


def conclude(results: dict[str, Any], folder: Path, command: str) -> None:
    """Write and print what the results amount to."""
    facts, entries = results["environment"], results["steps"]
    found = {name: entry.get("result", {}) for name, entry in entries.items()}
    text = ["# GPU day", "", f"`{command}`: {in_words(facts)}", ""]
    rates = [Ceilings(**of["ceilings"]) for of in found.values() if "ceilings" in of]
    text += [str(one) for one in {tuple(one.gemm_flops_per_s): one for one in rates}.values()]
    rows, text = rows_of(entries), [*text, ""]
    for quantity in report.QUANTITIES:
        text += report.tables(rows, quantity)
    text += [f"- {n}: {json.dumps(of)}" for n, of in found.items() if of and "rows" not in of]
    text += [f"- {n}: failed: {e['reason']}" for n, e in entries.items() if "reason" in e]
    print(*text, "", sep="\n")
    print("written:", *report.write(folder, text, rows, in_words(facts, report.FACTS)))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_day", None, __doc__.splitlines()[0])
    text = "folder of the results: a new or empty one, or that of an earlier call"
    parser.add_argument("--out", type=Path, required=True, help=text)
    text = f"when to stop measuring; default {MINUTES:g}, so that a call takes at most 9.5"
    parser.add_argument("--minutes", type=float, default=MINUTES, help=text)
    text = "regular expression: run only steps whose names it matches"
    parser.add_argument("--only", default="", metavar="PATTERN", help=text)
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    if not 0 < arguments.minutes < math.inf:
        parser.error(f"--minutes: expected a number above 0, got {arguments.minutes}")
    try:
        wanted = [step for step in steps() if re.search(arguments.only, step.name)]
        if not torch.cuda.is_available():
            print(environment.NOT_PERFORMANCE, "With one, these would be the steps:", sep="\n")
            print(*(f"{step.name}: {shlex.join(step.command)}" for step in wanted), sep="\n")
            return
        results = results_in(arguments.out)
        save(results, arguments.out)
    except re.error as error:
        parser.error(f"--only: expected a regular expression, got {arguments.only!r}: {error}")
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}")
    entries = results["steps"]
    for step in left_of(wanted, entries):
        if (seconds := min(step.seconds, deadline - time.monotonic())) >= LEAST_SECONDS:
            entry = entries[step.name] = step.run(arguments.out, seconds)
            save(results, arguments.out)
            print(f"{step.name}: {in_words(entry, ('status', 'seconds', 'reason'))}", flush=True)
    conclude(
        results, arguments.out, shlex.join(["python", "-m", "benchmarks.gpu_day", *sys.argv[1:]])
    )
    left = left_of(wanted, entries)
    most = sum(step.seconds for step in left) / 60
    print(f"{len(left)} of {len(wanted)} steps are left: at most {most:.0f} minutes")


if __name__ == "__main__":
    main()

"""Execute the compiled kernels on the CPU: everything, or a selection.

Prints a line for each run, with the largest error of the block and of PyTorch, and one for each
group. With --log the lines are appended to a file as well, and runs that it lists as passed are
skipped, so that a run that was stopped can be continued. Exits with 1 on a wrong value or a
violation.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import triton

from benchmarks.environment import commit
from tests.ptx import cases, compiled
from tests.ptx.blocks import Outcome
from tests.ptx.cases import Task

TASKS_OF_A_PROCESS = 100  # Triton keeps all that it compiled


def run(task: Task) -> tuple[Outcome, float]:
    """The outcome and its seconds; an error is a problem like any other."""
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        outcome = task.run()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        outcome = Outcome([f"{type(error).__name__} in {where}: {error}"], {}, 0)
    return outcome, time.monotonic() - start


def line_of(task: Task, outcome: Outcome, seconds: float) -> str:
    """``ok`` or ``FAILED``, the group, the name, then what was seen."""
    if task.group == "mutants":
        counts = outcome.errors.items()
        seen = ", ".join(f"{name} {a} of {b}" for name, (a, b) in counts) or "as expected"
    else:
        worst = {name: pair[0] for name, pair in outcome.errors.items()}
        name = max(worst, key=worst.__getitem__) if worst else "nothing"
        error, plain = outcome.errors.get(name, (0.0, 0.0))
        seen = f"{outcome.launches} launches, {name} {error:.1e} (PyTorch {plain:.1e})"
    state = "FAILED" if outcome.problems else "ok"
    return f"{state} | {task.group} | {task.name} | {seen}, {seconds:.1f} s"


def passed(log: Path | None) -> set[tuple[str, str]]:
    """Group and name of all that a log has as passed."""
    if log is None or not log.exists():
        return set()
    parts = [line.split(" | ") for line in log.read_text().splitlines()]
    return {(part[1], part[2]) for part in parts if part[0] == "ok"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.ptx.full", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--selection", action="store_true", help="what every change has to pass")
    which.add_argument("--quick", action="store_true", help="what other Tritons have to pass")
    which.add_argument("--group", nargs="+", help="only these groups of everything")
    add = parser.add_argument
    add("--only", metavar="TEXT", default="", help="only runs with this in their name")
    add("--random", type=int, default=1000, metavar="N", help="random blocks (default 1000)")
    add("--first-seed", type=int, default=1, help="of the random blocks (default 1)")
    add("--processes", type=int, default=os.cpu_count(), help="by default one per core")
    add("--share", metavar="I/N", default="1/1", help="every Nth run, from the Ith on")
    add("--log", type=Path, metavar="FILE", help="file to append to, and to continue from")
    options = parser.parse_args(arguments)
    if reason := compiled.missing():
        print(f"nothing can be executed: {reason}", file=sys.stderr)
        return 2
    compiled.executor()  # once, before processes want it

    if options.selection or options.quick:
        tasks = cases.selection() if options.selection else cases.quick_selection()
    else:
        first = options.first_seed
        groups = cases.groups(range(first, first + options.random))
        if unknown := set(options.group or ()) - set(groups):
            parser.error(f"--group: expected some of {', '.join(groups)}, got {', '.join(unknown)}")
        tasks = [task for name in options.group or groups for task in groups[name]]
    share = re.fullmatch(r"(\d+)/(\d+)", options.share)
    if share is None or not 1 <= int(share[1]) <= int(share[2]):
        parser.error(f"--share: expected I/N with I from 1 to N, got {options.share}")
    named = [task for task in tasks if options.only in task.name]
    if not named:
        parser.error(f"--only: no run has {options.only!r} in its name")
    tasks = named[int(share[1]) - 1 :: int(share[2])]
    done = passed(options.log)
    todo = [task for task in tasks if (task.group, task.name) not in done]

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(options.log.open("a")) if options.log else None

        def say(text: str) -> None:
            print(text, flush=True)
            if file is not None:
                print(text, file=file, flush=True)

        say(
            f"# Python {platform.python_version()}, torch {torch.__version__}, triton "
            f"{triton.__version__}, commit {commit()}, "
            f"{time.strftime('%Y-%m-%dT%H:%MZ', time.gmtime())}: {len(todo)} of {len(tasks)} runs"
        )
        return run_all(todo, options.processes, say)


def run_all(tasks: list[Task], processes: int, say: Callable[[str], None]) -> int:
    """Run tasks side by side; say a line of each, then one of each group."""
    groups: dict[str, list[tuple[Outcome, float]]] = {}
    context = multiprocessing.get_context("spawn")
    # new processes now and then: max_tasks_per_child hangs in Python 3.11 (python/cpython#115634)
    size = TASKS_OF_A_PROCESS * processes
    for first in range(0, len(tasks), size):
        with ProcessPoolExecutor(processes, context) as pool:
            futures = {pool.submit(run, task): task for task in tasks[first : first + size]}
            for future in as_completed(futures):
                task, (outcome, seconds) = futures[future], future.result()
                say(line_of(task, outcome, seconds))
                for problem in outcome.problems:
                    say("  " + problem.replace("\n", "\n  "))
                groups.setdefault(task.group, []).append((outcome, seconds))
    for name, results in groups.items():
        bad = sum(bool(outcome.problems) for outcome, _ in results)
        launches = sum(outcome.launches for outcome, _ in results)
        say(
            f"# {name}: {len(results) - bad} of {len(results)} runs passed, {launches} launches, "
            f"{sum(seconds for _, seconds in results):.0f} s of one core"
        )
    return int(any(outcome.problems for results in groups.values() for outcome, _ in results))


if __name__ == "__main__":
    sys.exit(main())

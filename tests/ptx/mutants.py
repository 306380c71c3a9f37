"""Kernels broken on purpose: what is taken out of their PTX has to be noticed."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator

from tests.ptx.blocks import Block, Outcome
from tests.ptx.cases import Size, Task

Replacement = str | Callable[[re.Match[str]], str]

# what is looked for in the PTX, and what takes its place
MUTATIONS: dict[str, tuple[str, Replacement]] = {
    "barrier removed": (r"^[ \t]*bar\.sync\s+0;", ""),
    "copies not waited for": (r"^[ \t]*cp\.async\.wait_group\s+\d+;", ""),
    "one group of copies fewer waited for": (
        r"^[ \t]*cp\.async\.wait_group\s+(\d+);",
        lambda m: f"cp.async.wait_group {int(m[1]) + 1};",
    ),
    "wgmma not waited for": (r"^[ \t]*wgmma\.wait_group\.sync\.aligned\s+\d+;", ""),
    "proxy fence removed": (r"^[ \t]*fence\.proxy\.async\S*;", ""),
    "guard of a load removed": (r"^[ \t]*@!?%p\d+ (?=ld\.global)", ""),
    "guard of a store removed": (r"^[ \t]*@!?%p\d+ (?=st\.global)", ""),
    "zero fill of a copy ignored": (
        r"(cp\.async\.c\w\.shared\.global .*, (0x[0-9a-f]+), )%r\d+;",
        lambda m: f"{m[1]}{int(m[2], 16)};",
    ),
    "shared store moved by 2 bytes": (
        r"(st\.shared\.\S+ \[ %r\d+ \+ )0( \])",
        lambda m: f"{m[1]}2{m[2]}",
    ),
    "matrix load from the wrong row": (
        r"(ldmatrix\S+ .*\[%r\d+)(\];)",
        lambda m: f"{m[1]}+16{m[2]}",
    ),
}
ON_HOPPER = ("wgmma not waited for", "proxy fence removed")


def mutants(text: str, mutation: str, most: int) -> Iterator[str]:
    """Each place changed alone; of many, ``most`` or a few more, evenly chosen."""
    pattern, replacement = MUTATIONS[mutation]
    places = list(re.finditer(pattern, text, re.M))
    for place in places[:: max(1, len(places) // most)]:
        new = replacement if isinstance(replacement, str) else replacement(place)
        yield text[: place.start()] + new + text[place.end() :]


def run_mutation(block: Block, mutation: str, most: int) -> Outcome:
    """A problem if no mutant was noticed: not every barrier is needed, but some are.

    The errors of the outcome are counts: mutants that a violation gave away, and all.
    """
    texts: dict[str, str] = {}

    def keep(kernel: str, text: str) -> str:
        texts.setdefault(text, kernel)
        return text

    before = block.run(change=keep)
    if before.problems:
        return before
    counts: Counter[str] = Counter()
    for original in texts:
        for mutant in mutants(original, mutation, most):
            swap = functools.partial(swapped, original, mutant)
            problems = block.run(change=swap).problems
            wrong_only = all(problem.startswith("wrong value") for problem in problems)
            counts["unnoticed" if not problems else "value" if wrong_only else "violation"] += 1
    total = counts.total()
    found = counts["violation"] + counts["value"]
    problems = [] if found else [f"{mutation}: none of {total} mutants was noticed"]
    return Outcome(
        problems, {"violation": (counts["violation"], total), "noticed": (found, total)}, total
    )


def swapped(original: str, mutant: str, kernel: str, text: str) -> str:
    return mutant if text == original else text


def mutation_tasks(archs: tuple[int, ...], size: Size, most: int) -> list[Task]:
    """A task for each mutation that a chip's kernels have places for."""
    return [
        Task(
            "mutants",
            f"sm_{arch} {mutation}",
            functools.partial(run_mutation, Block(arch, "bf16", size), mutation, most),
        )
        for arch in archs
        for mutation in MUTATIONS
        if arch == 90 or mutation not in ON_HOPPER
    ]

"""Kernels broken on purpose: what is taken out of their PTX has to be noticed."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator

from tests.ptx.blocks import Block, Outcome
from tests.ptx.cases import Task
from tests.ptx.chip import Change
from tests.ptx.examples import run_masked_product

SIZE = (2, 136, 17, 9)  # B, C, H, W of the block
NARROW = (2, 96, 17, 9)  # the same for narrow_kernel

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
    "wgmma.fence removed": (r"^[ \t]*wgmma\.fence\.sync\.aligned;", ""),
    "warp barrier removed": (r"^[ \t]*bar\.warp\.sync\s+-1;", ""),
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
ON_AMPERE = ("matrix load from the wrong row",)  # of the example; Hopper reads operands in place
IN_CUDA = ("wgmma.fence removed", "warp barrier removed")  # of Triton not looked at
Subject = Callable[[Change], list[str]]  # runs kernels changed so, and says what is wrong


def mutants(text: str, mutation: str, most: int) -> Iterator[str]:
    """Each place changed alone; of many, ``most`` or a few more, evenly chosen."""
    pattern, replacement = MUTATIONS[mutation]
    places = list(re.finditer(pattern, text, re.M))
    for place in places[:: max(1, len(places) // most)]:
        new = replacement if isinstance(replacement, str) else replacement(place)
        yield text[: place.start()] + new + text[place.end() :]


def run_mutation(
    subject: Subject, mutation: str, most: int, needed: bool, unnoticed: int | None = None
) -> Outcome:
    """A problem if no mutant was noticed: not every barrier is needed, but some are.

    The errors of the outcome are counts: mutants that a violation gave away, that were noticed by
    that or by a wrong value, and all.

    Args:
        subject: what is broken.
        mutation: how, of ``MUTATIONS``.
        most: places of a kernel to try.
        needed: whether it is a problem that there is no place for the mutation.
        unnoticed: how many mutants may not be noticed, if that is known.
    """
    texts: dict[str, str] = {}

    def keep(kernel: str, text: str) -> str:
        texts.setdefault(text, kernel)
        return text

    if problems := subject(keep):
        return Outcome(problems, {}, 1)
    counts: Counter[str] = Counter()
    for original in texts:
        for mutant in mutants(original, mutation, most):
            problems = subject(functools.partial(swapped, original, mutant))
            wrong_only = all(problem.startswith("wrong value") for problem in problems)
            counts["unnoticed" if not problems else "value" if wrong_only else "violation"] += 1
    total = counts.total()
    found = total - counts["unnoticed"]
    enough = found > 0 if unnoticed is None else total - found <= unnoticed
    blind = not enough if total else needed
    problems = [f"{mutation}: {found} of {total} mutants were noticed"] if blind else []
    errors = {"violation": (counts["violation"], total), "noticed": (found, total)}
    return Outcome(problems, errors, total)


def swapped(original: str, mutant: str, kernel: str, text: str) -> str:
    return mutant if text == original else text


def broken_block(block: Block, change: Change) -> list[str]:
    return block.run(change=change).problems


def mutation_tasks(archs: tuple[int, ...], most: int) -> list[Task]:
    """Every mutation, of all places in an example and of some in a block's kernels."""
    tasks = []
    for arch in archs:
        example = functools.partial(run_masked_product, arch)
        subjects = {"block": SIZE} | ({"narrow block": NARROW} if arch == 90 else {})
        for name in MUTATIONS:
            if name in IN_CUDA + (ON_AMPERE if arch == 90 else ON_HOPPER):
                continue
            run = functools.partial(run_mutation, example, name, 100, True)
            tasks.append(Task("mutants", f"sm_{arch} example: {name}", run))
        for (kind, size), name in itertools.product(subjects.items(), MUTATIONS):
            if name not in IN_CUDA and (arch == 90 or name not in ON_HOPPER):
                block = functools.partial(broken_block, Block(arch, "bf16", size))
                run = functools.partial(run_mutation, block, name, most, False)
                tasks.append(Task("mutants", f"sm_{arch} {kind}: {name}", run))
    return tasks

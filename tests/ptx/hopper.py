"""The blocks that ``smlp_kernels.hopper`` executes, its kernels broken on purpose."""

import functools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from smlp.testing import NAMES
from tests.ptx.blocks import Block
from tests.ptx.cases import Task
from tests.ptx.chip import Change
from tests.ptx.mutants import broken_block, run_mutation

BIASES = ("bias_h", "bias_w", "bias_fuse")
# B, C, H, W of batch 128's share of one group of images, and of the chip's multiprocessors, so
# that the kernel and its passes are those of the whole batch on 132
STAGES = {
    (1, 320, 14, 14): 1, (1, 384, 14, 14): 1, (1, 448, 14, 14): 1,
    (5, 640, 7, 7): 5, (4, 768, 7, 7): 4, (5, 896, 7, 7): 5,
}  # fmt: skip


def block(precision: str, *size: int, **options: Any) -> Block:
    """Output and gradient of x, each by one launch."""
    given = {"wanted": ("x",), "multiprocessors": 132, **options}
    return Block(90, precision, size, **given)  # type: ignore[arg-type]


def whole_images() -> Iterator[Block]:
    """H and W up to 16: lines of up to 8 and more, images that do not fill a tile, odd channels."""
    yield from (block("bf16", *size) for size in (
        (1, 64, 14, 14), (2, 128, 14, 14), (1, 320, 14, 14), (1, 80, 14, 14), (1, 72, 14, 14),
        (2, 24, 14, 14), (1, 64, 16, 16), (4, 72, 8, 8), (3, 64, 10, 10),
        (3, 80, 14, 7), (2, 64, 15, 16), (3, 40, 9, 13), (3, 40, 1, 16), (3, 40, 16, 1),
        (2, 40, 1, 1), (4, 64, 6, 6), (5, 64, 4, 12), (20, 64, 4, 4), (40, 32, 2, 2),
    ))  # fmt: skip
    yield from (block("fp16", *size) for size in (
        (1, 192, 14, 14), (3, 8, 14, 14), (5, 96, 7, 7), (9, 64, 7, 7), (2, 64, 16, 15),
        (2, 96, 16, 16),
    ))  # fmt: skip
    yield from (block("bf16", *size, nan=True) for size in (
        (6, 128, 7, 7), (7, 192, 7, 7), (5, 64, 8, 8), (2, 64, 12, 12), (2, 64, 7, 14),
        (4, 40, 5, 3),
    ))  # fmt: skip
    yield block("bf16", 2, 128, 14, 14, absent=BIASES)
    yield block("bf16", 2, 96, 7, 7, absent=BIASES[:2])
    yield block("fp16", 2, 192, 14, 14, bias_map=True)
    yield block("bf16", 3, 64, 11, 11, bias_map=True, nan=True)
    yield block("bf16", 2, 72, 14, 14, transposed_weights=True)
    yield block("fp16", 3, 96, 7, 7, transposed_weights=True, absent=BIASES)
    yield block("bf16", 2, 96, 14, 14, early_copies=True)
    yield block("bf16", 2, 64, 14, 14, wanted=NAMES)  # weight gradients are Triton's


def strips() -> Iterator[Block]:
    """H or W from 17 to 32."""
    yield from (block("bf16", *size) for size in (
        (1, 160, 28, 28), (1, 192, 28, 28), (1, 64, 32, 32), (1, 64, 24, 24), (1, 40, 28, 20),
        (1, 40, 17, 31), (1, 40, 32, 18), (1, 40, 18, 32),
    ))  # fmt: skip
    yield block("fp16", 1, 96, 28, 28)
    yield block("bf16", 2, 72, 28, 28, nan=True)
    yield block("bf16", 2, 40, 20, 28, nan=True)
    yield block("bf16", 1, 32, 28, 28, absent=BIASES)
    yield block("fp16", 1, 192, 28, 28, bias_map=True)
    yield block("bf16", 1, 56, 28, 28, transposed_weights=True)
    yield block("bf16", 1, 96, 28, 28, early_copies=True)


def one_group() -> Iterator[Block]:
    """The stages of the networks, one group of images."""
    for size, share in STAGES.items():
        yield block("bf16", *size, multiprocessors=share)


def whole_batches() -> Iterator[Block]:
    """The stages of the networks as they are trained."""
    for _, channels, side, _ in STAGES:
        yield block("bf16", 128, channels, side, side)
    yield block("bf16", 128, 160, 28, 28)
    yield block("bf16", 128, 192, 28, 28)


def random_block(seed: int) -> Block:
    """Any size, biases and layout of the weights."""
    draw = random.Random(seed)
    largest = draw.choice((16, 16, 32))
    size = (draw.randint(1, 96 // largest), 8 * draw.randint(1, 24))
    return block(
        draw.choice(("bf16", "fp16")), *size, draw.randint(1, largest), draw.randint(1, largest),
        multiprocessors=draw.choice((1, 4, 132)),
        absent=tuple(name for name in BIASES if draw.random() < 0.3),
        bias_map=draw.random() < 0.3,
        transposed_weights=draw.random() < 0.3,
        nan=draw.random() < 0.3,
        early_copies=draw.random() < 0.2,
    )  # fmt: skip


def quick() -> list[Block]:
    """One of each: tile, whole or half lines, type, way that the weights lie."""
    return [
        block("bf16", 1, 64, 14, 14), block("fp16", 2, 64, 16, 15), block("bf16", 1, 64, 16, 16),
        block("bf16", 6, 128, 7, 7, nan=True), block("bf16", 2, 72, 28, 28, nan=True),
        block("bf16", 2, 72, 14, 14, transposed_weights=True),
    ]  # fmt: skip


def selection() -> list[Task]:
    """What every change runs; what has most to synchronise in several orders of warps."""
    cases = [*whole_images(), *strips(), *one_group()]
    found = [Task("hopper", str(case), case.run) for case in cases]
    ordered = [
        block("bf16", 1, 96, 28, 28), block("bf16", 1, 48, 28, 28), block("bf16", 1, 128, 14, 14),
        block("bf16", 6, 96, 7, 7, nan=True), block("bf16", 1, 72, 16, 16, bias_map=True),
    ]  # fmt: skip
    return found + [
        Task("hopper", f"seed {seed}: {case}", functools.partial(case.run, seed))
        for seed in (2, 3, 4, 5)
        for case in ordered
    ]


def everything() -> list[Task]:
    found = selection()
    for seed in range(1, 301):
        case = random_block(seed)
        run = functools.partial(case.run, seed)
        found.append(Task("hopper", f"random {seed}: {case}", run))
    return found + [Task("hopper", str(case), case.run) for case in whole_batches()]


# A step has a wait for each of its operands, so that all but barriers of a warp are needed.
SYNCHRONISATION = (
    "barrier removed", "copies not waited for", "one group of copies fewer waited for",
    "wgmma not waited for", "proxy fence removed", "wgmma.fence removed",
)  # fmt: skip
TWO_PASSES = block("bf16", 1, 256, 14, 14, multiprocessors=1)
ONE_STRIP = block("bf16", 1, 64, 7, 28)


def mutation_tasks(cases: list[Block]) -> list[Task]:
    """Every place changed alone, in the kernels for the output and for the gradient."""
    return [
        Task("mutants", f"{case}: {name}", functools.partial(
            run_mutation, functools.partial(broken_block, case), name, 100, True, unnoticed=0
        ))
        for case in cases
        for name in SYNCHRONISATION
    ]  # fmt: skip


def broken_output(case: Block, change: Change) -> list[str]:
    """With a bias map and without one."""
    with_map = replace(case, bias_map=True)
    return broken_block(case, change) + broken_block(with_map, change)


def all_mutation_tasks() -> list[Task]:
    """Also of tiles with fewer stages, and barriers of a warp."""
    cases = [
        TWO_PASSES, block("bf16", 5, 192, 7, 7, multiprocessors=1),
        block("bf16", 1, 256, 16, 16, multiprocessors=1), ONE_STRIP,
    ]  # fmt: skip
    found = mutation_tasks(cases)
    for case in cases:
        for transposed in (False, True):
            output = replace(case, wanted=(), transposed_weights=transposed)
            # the last is followed by one of the block, or by nothing
            found.append(Task("mutants", f"{output}: warp barrier removed", functools.partial(
                run_mutation, functools.partial(broken_output, output), "warp barrier removed",
                100, True, unnoticed=1,
            )))  # fmt: skip
    return found

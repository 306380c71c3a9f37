"""What is executed: a selection for every change, and everything, by groups."""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from smlp.testing import NAMES
from tests.ptx.blocks import PRECISIONS, Block, Outcome

NHWC, NCHW = "channels_last", "contiguous"
LAYOUTS = (NHWC, NCHW)
ARCHS = (80, 86, 89, 90, 120)
Size = tuple[int, int, int, int]  # B, C, H, W

SIDES = (56, 28, 14, 7)
STAGES: dict[int, list[Size]] = {  # by the width of a network's first stage
    width: [(3 if side == 7 else 1, width * 56 // side, side, side) for side in SIDES]
    for width in (80, 96, 112)
}
LONG: list[Size] = [(1, 16, 112, 112), (2, 24, 80, 40), (1, 9, 33, 100)]
ODD: list[Size] = [
    (2, 7, 5, 3), (2, 33, 17, 9), (3, 24, 13, 30), (1, 50, 40, 56), (3, 40, 16, 16), (5, 17, 1, 8),
    (2, 64, 9, 64), (1, 130, 7, 12), (2, 5, 1, 1), (3, 3, 2, 2), (2, 64, 8, 50), (1, 72, 9, 40),
    (2, 96, 11, 6), (1, 256, 15, 16), (1, 150, 23, 23), (1, 48, 31, 62), (1, 80, 64, 33),
]  # fmt: skip
FEW: list[Size] = [
    (1, 32, 56, 56), (1, 64, 28, 28), (2, 96, 14, 14), (2, 128, 7, 7), (2, 33, 17, 9),
    (1, 16, 112, 112),
]  # fmt: skip
LARGE: list[Size] = [(1, 8, 256, 256), (1, 2048, 4, 4), (20, 64, 7, 7), (1, 48, 32, 128)]
NARROW: list[Size] = [  # with several tiles for each program, and all positions and slices
    (1, 40, 64, 33), (2, 96, 14, 20), (3, 128, 7, 30), (1, 64, 56, 16), (8, 40, 56, 56),
    (60, 40, 14, 14), (1, 104, 1, 48),
]  # fmt: skip
# so many tiles that every program takes several: the loops over tiles come to their steady state
MANY_TILES: list[Size] = [(500, 16, 7, 7), (120, 24, 14, 14), (40, 16, 28, 28), (10, 16, 56, 56)]


class Task(NamedTuple):
    """A run that can be repeated by its name."""

    group: str
    name: str
    run: Callable[[], Outcome]


def blocks(
    archs: tuple[int, ...], precision: str, layouts: tuple[str, ...], sizes: list[Size]
) -> Iterator[Block]:
    """Plain training steps."""
    for arch in archs:
        for layout in layouts:
            for size in sizes:
                yield Block(arch, precision, size, layout)


def shipped() -> list[Block]:
    """Every configuration that an H100 and an A100 take from the tables of tiles, once.

    float16 has bfloat16's tiles and code but for the type of the products, so that a few sizes
    suffice; float32 compiles to the same on both chips.
    """
    h100, a100 = (90,), (80,)
    tiny, long = STAGES[80], [(1, 16, 72, 66)]
    simple: list[Size] = [(2, 40, 9, 7), (1, 24, 20, 28), (1, 16, 56, 40)]
    found = [
        *blocks(h100, "bf16", (NHWC,), [*tiny, *STAGES[96], *STAGES[112], *long]),
        *blocks(h100, "bf16", (NCHW,), [*tiny, *long]),
        *blocks(a100, "bf16", LAYOUTS, [*tiny, *long]),
        *blocks(h100, "tf32", LAYOUTS, tiny),
        *blocks(h100, "tf32", (NHWC,), long),
        *blocks(a100, "tf32", (NHWC,), tiny),
        *blocks(a100, "tf32", (NCHW,), [tiny[2]]),
        *blocks(h100, "fp16", (NHWC,), [tiny[2]]),
        *blocks(a100, "fp16", (NHWC,), [tiny[1]]),
        *blocks(h100, "fp32", (NHWC,), [*simple, *long]),
        *blocks(h100, "fp32", (NCHW,), [simple[0]]),
        *blocks(h100, "fp64", (NHWC,), simple),
        *blocks(h100, "fp64", (NCHW,), [simple[0]]),
        *blocks(a100, "fp64", (NHWC,), [*simple, *long]),
    ]
    return found


def quick() -> list[Block]:
    """For Tritons other than the newest that PyTorch comes with."""
    tiny = STAGES[80]
    return [
        *blocks((90,), "bf16", (NHWC,), tiny),
        *blocks((90,), "bf16", (NCHW,), [tiny[2]]),
        *blocks((90,), "tf32", (NHWC,), [tiny[2]]),
        *blocks((80,), "bf16", (NHWC,), [tiny[0], tiny[2]]),
    ]


def variants(block: Block, thorough: bool) -> Iterator[Block]:
    """What a plain training step leaves out, on the chip and in the precision of ``block``.

    Args:
        block: its size does not matter.
        thorough: all of them; else those whose kernels differ most.
    """
    small = replace(block, size=(2, 32, 10, 14))
    yield replace(small, gradient_layout="bordered")
    yield replace(small, layout="shifted")
    yield replace(small, size=(2, 40, 14, 14), autocast=True)
    yield replace(small, size=(1, 16, 10, 12), layout="far", gradient_layout=NCHW)
    yield replace(small, bias_map=True, absent=("bias_h",))
    if not thorough:
        return
    for name in NAMES:
        yield replace(small, wanted=(name,))
    yield replace(small, absent=("bias_h", "bias_w", "bias_fuse"))
    yield replace(small, bias_map=True, layout=NCHW, wanted=())
    for layout in ("bordered", "strided", "transposed"):
        yield replace(small, layout=layout)
    for layout in ("strided", "transposed", "shifted"):
        yield replace(small, gradient_layout=layout)
    for batch in (1, 3, 4, 5, 9):  # images that do not fill the tiles
        yield replace(small, size=(batch, 32, 7, 7))


def narrow() -> Iterator[Block]:
    """What takes ``narrow_kernel``, and what a plain training step of it leaves out."""
    for precision in ("bf16", "fp16"):
        yield from blocks((90,), precision, (NHWC,), NARROW)
    small = Block(90, "bf16", (3, 40, 10, 20))
    yield replace(small, bias_map=True)
    yield replace(small, wanted=("x",), transposed_weights=True)
    yield replace(small, wanted=())
    yield replace(small, transposed_weights=True)
    yield replace(small, nan=True)
    yield replace(small, autocast=True)
    yield replace(small, order=2)
    for name in ("bias_h", "bias_w", "bias_fuse"):
        yield replace(small, absent=(name,))


def second_order(archs: tuple[int, ...]) -> Iterator[Block]:
    for arch in archs:
        yield Block(arch, "fp64", (2, 20, 9, 11), order=2)
        yield Block(arch, "bf16", (2, 24, 9, 12), order=2)


def random_block(seed: int) -> Block:
    """A bf16 block of any size, layouts, wanted gradients and absent biases, on a random chip.

    Half of the sizes are multiples of 8, with which accesses are wide and asynchronous.
    """
    draw = random.Random(seed)

    def size(most: int) -> int:
        number = draw.randint(1, most)
        return -(-number // 8) * 8 if draw.random() < 0.5 else number

    layouts = [NHWC, NHWC, NCHW, "bordered", "strided", "transposed", "shifted"]
    return Block(
        draw.choice(ARCHS),
        "bf16",
        (draw.randint(1, 3), size(100), size(33), size(33)),
        draw.choice(layouts),
        draw.choice(layouts),
        wanted=tuple(n for n in NAMES if draw.random() < 0.7),
        absent=tuple(n for n in ("bias_h", "bias_w", "bias_fuse") if draw.random() < 0.2),
    )


def random_narrow_block(seed: int) -> Block:
    """A bf16 block of any size that ``narrow_kernel`` takes."""
    draw = random.Random(seed)
    size = (draw.randint(1, 3), 8 * draw.randint(5, 16), draw.randint(1, 64), draw.randint(1, 64))
    absent = tuple(n for n in ("bias_h", "bias_w", "bias_fuse") if draw.random() < 0.2)
    return Block(90, "bf16", size, wanted=draw.choice([NAMES, NAMES, ("x",), ()]), absent=absent)


def groups(random_seeds: range) -> dict[str, list[Task]]:
    """Everything, by groups."""
    from tests.ptx import hopper
    from tests.ptx.mutants import mutation_tasks

    bf16 = [*STAGES[80], *STAGES[96], *STAGES[112], *ODD, *LONG]
    others = [p for p in PRECISIONS if p != "bf16"]
    smaller = (86, 89, 120)
    found: dict[str, list[Block]] = {
        "bf16": [
            *blocks((80, 90), "bf16", LAYOUTS, bf16),
            *blocks(smaller, "bf16", LAYOUTS, [*STAGES[80], *ODD[:8], LONG[0]]),
        ],
        "other types": [b for p in others for b in blocks(ARCHS, p, LAYOUTS, FEW)],
        "narrow": [*narrow(), *map(random_narrow_block, range(100))],
        "large": list(blocks((80, 90), "bf16", (NHWC,), LARGE)),
        "many tiles": [
            b for p in ("bf16", "tf32") for b in blocks((80, 90), p, LAYOUTS, MANY_TILES)
        ],
        "variants": [
            b for arch in ARCHS for b in variants(Block(arch, "bf16", (1, 1, 1, 1)), thorough=True)
        ],
        "second order": list(second_order(ARCHS)),
        "early copies": [
            replace(block, early_copies=True)
            for p in ("bf16", "tf32")
            for block in blocks((80, 90), p, LAYOUTS, [*STAGES[96], *MANY_TILES[:2]])
        ],
    }
    tasks = {
        name: [Task(name, str(block), block.run) for block in blocks_]
        for name, blocks_ in found.items()
    }
    tasks["hopper"] = hopper.everything()
    tasks["mutants"] = mutation_tasks((80, 90), most=8) + hopper.all_mutation_tasks()
    tasks["random"] = [random_task(seed) for seed in random_seeds]
    return tasks


def random_task(seed: int) -> Task:
    block = random_block(seed)
    return Task("random", f"{seed}: {block}", functools.partial(block.run, seed))


def selection() -> list[Task]:
    """What every change runs."""
    from tests.ptx import hopper
    from tests.ptx.examples import run_race
    from tests.ptx.mutants import mutation_tasks

    found = [
        *shipped(),
        *(b for arch in (80, 90) for b in variants(Block(arch, "bf16", (1, 1, 1, 1)), False)),
        *second_order((90,)),
        *narrow(),
        Block(90, "bf16", MANY_TILES[0]),
        Block(90, "bf16", STAGES[80][2], early_copies=True),
    ]
    tasks = [Task("selection", str(block), block.run) for block in found]
    tasks.append(Task("mutants", "a race of Triton's pipeliner", run_race))
    tasks += mutation_tasks((90,), most=3)
    return tasks + hopper.selection() + hopper.mutation_tasks([hopper.TWO_PASSES, hopper.ONE_STRIP])


def quick_selection() -> list[Task]:
    """What every change runs at least, and the oldest and the newest Triton."""
    from tests.ptx import hopper

    blocks_ = [*quick(), *hopper.quick()]
    return [Task("quick", str(block), block.run) for block in blocks_]

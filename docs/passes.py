"""Draw ``docs/passes.svg``: what carries x through GPU memory, in eager PyTorch and fused.

    python -m docs.passes

The left half is recorded, not remembered: a forward of ``smlp.SMLPBlock`` on tensors without
memory, every operator that reads or writes tensors of the size of x, in the default layout. What
cuDNN may copy inside the convolution is not seen and not counted. The right half is what
``smlp_kernels/kernels/mix.py`` launches for a chunk of images.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smlp import SMLPBlock

PICTURE = Path(__file__).with_suffix(".svg")
SIZE = (8, 80, 56, 56)  # B, C, H, W; x is larger than any weight
TITLES = {
    "clone": "transposed copy",
    "mm": "product along H",
    "add": "its bias",
    "addmm": "product along W",
    "cat": "concatenation",
    "convolution": "1x1 convolution",
}

PASS, GAP, TOP = 17, 9, 62  # height of an arrow's lane, space between operators, the first of them
BOX, RAIL = 150, 26  # widths
READ, WRITE, CACHED, INK, PAPER = "#0969da", "#bc4c00", "#8c959f", "#1f2328", "#ffffff"


class Step(NamedTuple):
    """An operator, and how many tensors of the size of x it reads and writes."""

    name: str
    reads: int
    writes: int


def recorded_steps() -> list[Step]:
    """The operators of the plain block."""
    _, channels, height, width = SIZE
    block = SMLPBlock(height, width, channels, device="meta")
    x = torch.empty(SIZE, device="meta")
    steps: list[Step] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            memory = {tensor.untyped_storage()._cdata for tensor in inputs}
            if result.untyped_storage()._cdata not in memory:  # no view
                reads = sum(tensor.numel() // x.numel() for tensor in inputs)
                name = func.overloadpacket.__name__
                steps.append(Step(name, reads, result.numel() // x.numel()))
            return result

    with torch.no_grad(), Recorder():
        block(x)
    return steps


def passes(steps: list[Step]) -> int:
    """How often x, or a tensor of its size, is read or written."""
    return sum(step.reads + step.writes for step in steps)


def drawing(steps: list[Step]) -> str:
    """The picture as SVG."""
    height = TOP + PASS * passes(steps) + GAP * len(steps)
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{height + 50}" '
        f'viewBox="0 0 860 {height + 50}" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="13" fill="{INK}">',
        f'<rect width="860" height="{height + 50}" rx="8" fill="{PAPER}"/>',
        text(24, 32, f"Eager PyTorch: {passes(steps)} passes over GPU memory", 16),
        text(464, 32, "Fused, by design: 2 passes over GPU memory", 16),
        *rail(24, height, "GPU memory"),
        *rail(464, height, "GPU memory"),
    ]
    y = TOP
    for step in steps:
        shapes += operator(
            150, y, step.reads + step.writes, TITLES[step.name], f"aten::{step.name}"
        )
        for lane in range(step.reads + step.writes):
            is_read = lane < step.reads
            ends = (50, 150) if is_read else (150, 50)
            shapes.append(arrow(*ends, y + PASS * (lane + 0.5), READ if is_read else WRITE))
        y += PASS * (step.reads + step.writes) + GAP
    shapes += fused(height)
    for x, color, label in (
        (24, READ, "read"),
        (120, WRITE, "written"),
        (464, CACHED, "written and read in the L2 cache"),
    ):
        shapes += [arrow(x, x + 28, height + 28, color), text(x + 38, height + 32, label)]
    shapes.append(text(232, height + 32, "an arrow: a tensor as large as x"))
    return "\n".join([*shapes, "</svg>", ""])


def fused(height: int) -> list[str]:
    """The right half: two launches for a chunk of images, and the matrix between them."""
    middle = (TOP + height) // 2
    lanes = 4 * PASS
    first, second = TOP + 40, height - 40 - lanes
    shapes = [
        *rail(810, height, "L2 cache"),
        *operator(590, first, 4, "both axes", "a Triton kernel"),
        *operator(590, second, 4, "channel product", "cuBLAS"),
        arrow(490, 590, first + lanes / 2, READ),
        arrow(590, 490, second + lanes / 2, WRITE),
        text(532, first + lanes / 2 - 8, "x"),
        text(532, second + lanes / 2 - 8, "y"),
        text(590, middle - 12, "[x_h | x_w | x] of some images,"),
        text(590, middle + 6, "at most 34.5 MB, used again"),
        text(590, middle + 24, "for the next images"),
    ]
    for lane in (0.5, 1.5, 2.5):
        shapes.append(arrow(590 + BOX, 810, first + PASS * (lane + 0.5), CACHED))
        shapes.append(arrow(810, 590 + BOX, second + PASS * (lane + 0.5), CACHED))
    return shapes


def operator(x: float, y: float, lanes: int, title: str, name: str) -> list[str]:
    """A box with one lane for each arrow."""
    height, middle = lanes * PASS, y + lanes * PASS / 2
    return [
        f'<rect x="{x}" y="{y}" width="{BOX}" height="{height}" rx="4" fill="#f6f8fa" '
        f'stroke="{INK}"/>',
        text(x + BOX / 2, middle - 3, title, anchor="middle"),
        text(x + BOX / 2, middle + 12, name, 11, "middle"),
    ]


def rail(x: float, bottom: float, label: str) -> list[str]:
    """A memory, drawn as a vertical bar."""
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 {x + RAIL / 2} {middle})"'
    return [
        f'<rect x="{x}" y="{TOP - 8}" width="{RAIL}" height="{bottom - TOP + 8}" rx="4" '
        f'fill="#eaeef2" stroke="{INK}"/>',
        f'<text x="{x + RAIL / 2}" y="{middle + 4}" text-anchor="middle" {turned}>{label}</text>',
    ]


def arrow(start: float, end: float, y: float, color: str) -> str:
    """A horizontal arrow."""
    back = -7 if end > start else 7
    return (
        f'<path d="M{start} {y}H{end + back}" stroke="{color}" stroke-width="2"/>'
        f'<path d="M{end} {y}l{back} -4v8z" fill="{color}"/>'
    )


def text(x: float, y: float, label: str, size: int = 13, anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{label}</text>'


if __name__ == "__main__":
    PICTURE.write_text(drawing(recorded_steps()))

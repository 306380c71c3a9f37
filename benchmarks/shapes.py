"""The input shapes that are measured, by name.

Stage shapes are those of the paper's three networks at 224x224 (Table 1 of arXiv 2109.05422: widths
80/96/112 doubling per stage, feature maps of 56, 28, 14 and 7 pixels). The others are shapes people
use the block with outside those networks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from smlp.testing import PRECISIONS


@dataclass(frozen=True)
class Shape:
    """One input ``[batch, channels, height, width]`` with the name it is selected by."""

    name: str
    batch: int
    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for field in ("batch", "channels", "height", "width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")

    @property
    def size(self) -> tuple[int, int, int, int]:
        """B, C, H, W."""
        return self.batch, self.channels, self.height, self.width

    @property
    def pixels(self) -> int:
        """B * H * W, the rows of the channel product."""
        return self.batch * self.height * self.width

    @property
    def elements(self) -> int:
        """B * C * H * W."""
        return self.pixels * self.channels

    def __str__(self) -> str:
        return f"{self.name} {list(self.size)}"


# name of the arithmetic -> torch dtype of tensors and parameters. "tf32" and "fp32" store the same
# numbers; they differ in torch.get_float32_matmul_precision().
DTYPES = {name: PRECISIONS[name].dtype for name in ("bf16", "fp16", "tf32", "fp32")}
LAYOUTS: dict[str, torch.memory_format] = {
    "channels_last": torch.channels_last,
    "nchw": torch.contiguous_format,
}

BATCH = 128
WIDTHS = {"small": 96, "base": 112, "tiny": 80}
SIDES = (14, 28, 56, 7)  # 14x14 first: a network spends most of its time there

# Ordered so that a run that stops early has the most telling shapes: one whole network, then next.
STAGES = tuple(
    Shape(f"{model}-{side}", BATCH, width * 56 // side, side, side)
    for model, width in WIDTHS.items()
    for side in SIDES
)

DEMO = Shape("demo-224", 50, 3, 224, 224)  # the usage example of the common PyTorch ports

# Time per element at a fixed width as the image grows; the batch shrinks to keep B * H * W.
GROWTH = tuple(
    Shape(f"growth-{side}", BATCH * 56 * 56 // (side * side), 96, side, side)
    for side in (14, 28, 56, 112, 224)
)

OTHERS = (
    DEMO,
    Shape("wide-7-512", BATCH, 512, 7, 7),
    Shape("wide-7-2048", BATCH, 2048, 7, 7),
    Shape("wide-14-1024", BATCH, 1024, 14, 14),
    Shape("wide-28-512", BATCH, 512, 28, 28),
    Shape("wide-56-256", BATCH, 256, 56, 56),
    Shape("square-256", 8, 16, 256, 256),
    Shape("square-64", 32, 96, 64, 64),
    Shape("square-32", 32, 192, 32, 32),
    Shape("square-16", 32, 384, 16, 16),
    Shape("square-8", 32, 768, 8, 8),
    Shape("channel-32x128", 64, 48, 32, 128),
    Shape("channel-16x64", 64, 96, 16, 64),
    Shape("channel-8x32", 64, 192, 8, 32),
    Shape("cifar-32", BATCH, 16, 32, 32),
    Shape("cifar-16", BATCH, 32, 16, 16),
    Shape("cifar-8", BATCH, 64, 8, 8),
    Shape("cifar-4", BATCH, 128, 4, 4),
)

# What a machine without a GPU runs, to show that the harness works.
REHEARSAL = (
    Shape("rehearsal-14", 2, 16, 14, 14),
    Shape("rehearsal-8x32", 2, 12, 8, 32),
    Shape("rehearsal-7", 2, 33, 7, 7),
)

GROUPS: dict[str, tuple[Shape, ...]] = {
    "stages": STAGES,
    **{model: tuple(s for s in STAGES if s.name.startswith(model)) for model in WIDTHS},
    "others": OTHERS,
    "growth": GROWTH,
    "rehearsal": REHEARSAL,
}
BY_NAME: dict[str, Shape] = {shape.name: shape for group in GROUPS.values() for shape in group}


def expect(argument: str, value: str, known: Iterable[str]) -> None:
    """Raise a ValueError that names the argument unless its value is known."""
    if value not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {value!r}")


def select(names: Iterable[str]) -> tuple[Shape, ...]:
    """Shapes by name or by group name, in the order given, each once.

    Raises:
        ValueError: for a name that is neither a shape nor a group.
    """
    chosen: dict[str, Shape] = {}
    for name in names:
        expect("shapes", name, [*GROUPS, *BY_NAME])
        for shape in GROUPS.get(name) or (BY_NAME[name],):
            chosen[shape.name] = shape
    return tuple(chosen.values())

"""The input shapes that are measured, by name.

Stage shapes are those of the paper's three networks at 224x224 (Table 1 of arXiv 2109.05422: widths
80/96/112 doubling per stage, feature maps of 56, 28, 14 and 7 pixels). The others are shapes people
use the block with outside those networks.
"""

import math
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
    def elements(self) -> int:
        """B * C * H * W."""
        return math.prod(self.size)

    def __str__(self) -> str:
        return f"{self.name} {list(self.size)}"


# name of the arithmetic -> torch dtype of tensors and parameters. "tf32" and "fp32" store the same
# numbers; they differ in torch.get_float32_matmul_precision().
DTYPES = {name: PRECISIONS[name].dtype for name in ("bf16", "fp16", "tf32", "fp32")}
LAYOUTS: dict[str, torch.memory_format] = {
    "channels_last": torch.channels_last,
    "nchw": torch.contiguous_format,
}
# What the stages are measured in.
VARIANTS = (
    ("bf16", "channels_last"),
    ("tf32", "channels_last"),
    ("fp16", "channels_last"),
    ("bf16", "nchw"),
)

BATCH = 128
IMAGES = (BATCH, 3, 224, 224)  # for a whole network
WIDTHS = {"small": 96, "base": 112, "tiny": 80}
SIDES = (56, 28, 14, 7)

STAGES = tuple(
    Shape(f"{model}-{side}", BATCH, width * 56 // side, side, side)
    for model, width in WIDTHS.items()
    for side in SIDES
)

# Shapes that people use the block with outside those networks, and 96 channels as the image grows.
OTHERS = (
    Shape("demo-224", 50, 3, 224, 224),  # the usage example of the common PyTorch ports
    Shape("host", 4, 96, 14, 14),  # microseconds of work for a GPU: the host is what takes time
    Shape("square-256", 8, 16, 256, 256),
    Shape("square-224", 8, 96, 224, 224),
    Shape("square-112", 32, 96, 112, 112),
    Shape("square-64", 32, 96, 64, 64),
    Shape("square-32", 32, 192, 32, 32),
    Shape("wide-7", BATCH, 2048, 7, 7),
    Shape("wide-28", BATCH, 512, 28, 28),
    Shape("channel-32x128", 64, 48, 32, 128),
    Shape("channel-8x32", 64, 192, 8, 32),
    Shape("cifar-32", BATCH, 16, 32, 32),
    Shape("cifar-4", BATCH, 128, 4, 4),
)

# What a machine without a GPU runs, to show that the harness works.
REHEARSAL = (
    Shape("rehearsal-14", 2, 16, 14, 14),
    Shape("rehearsal-8x32", 2, 40, 8, 32),
    Shape("rehearsal-7", 2, 33, 7, 7),
)

GROUPS: dict[str, tuple[Shape, ...]] = {
    "stages": STAGES,
    **{model: tuple(s for s in STAGES if s.name.startswith(model)) for model in WIDTHS},
    "others": OTHERS,
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

"""The tiles that :mod:`smlp_kernels.autotune` may take: neighbours of one, as far as they fit."""

import dataclasses
from dataclasses import dataclass

import torch
import triton

from smlp_kernels import configs
from smlp_kernels.configs import MixConfig, WeightGradConfig, block_of, even_step, width_of

ACCUMULATORS = 192  # 32-bit registers of a thread, of 255
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
ROWS = (16, 32, 64, 128)  # of a tile of the weight gradient
MAX_PROGRAMS = 4096  # partial results of a weight gradient, and a bound on the memory they take

Change = dict[str, int]


@dataclass(frozen=True)
class Problem:
    """What tiles are chosen for, the chip aside. The batch size is no part of it."""

    height: int
    width: int
    channels: int
    dtype: torch.dtype
    precision: str  # of products of float32, "ieee" or "tf32"
    channels_last: bool

    def __str__(self) -> str:
        layout = "NHWC" if self.channels_last else "NCHW"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.height}x{self.width}x{self.channels} {dtype} {self.precision} {layout}"


@dataclass(frozen=True)
class Chip:
    """What tiles depend on in a GPU."""

    name: str
    arch: int  # ten times the compute capability
    shared_memory: int  # of one program, bytes


def shipped_mix(problem: Problem, chip: Chip) -> MixConfig:
    """The table's tile."""
    p = problem
    return configs.mix_config(
        p.height, p.width, p.channels, p.dtype, chip.arch, p.precision, p.channels_last
    )


def shipped_weight_grad(problem: Problem, chip: Chip) -> WeightGradConfig:
    """The table's tiles."""
    p = problem
    return configs.weight_grad_config(p.channels, p.dtype, chip.arch, p.precision, p.channels_last)


def mix_fits(config: MixConfig, problem: Problem, chip: Chip) -> bool:
    """Whether the kernel could compile and run well with this tile; compiling tells for sure."""
    c, p = config, problem
    sizes = (c.images, c.tile_h, c.tile_w, c.block_c, c.block_h, c.block_w)
    if not (all(map(is_power_of_two, sizes)) and c.num_warps in WARPS and c.num_stages in STAGES):
        return False
    covers = (
        c.tile_h <= triton.next_power_of_2(p.height)
        and c.tile_w <= triton.next_power_of_2(p.width)
        and (c.step_h, c.step_w) == (even_step(p.height, c.tile_h), even_step(p.width, c.tile_w))
        and 16 <= c.block_c <= block_of(p.channels, c.block_c)
        and is_width(c.block_n, p.channels)
        and 16 <= c.block_h <= block_of(p.height, c.block_h)
        and 16 <= c.block_w <= block_of(p.width, c.block_w)
    )
    pixels = c.images * c.tile_h * c.tile_w
    # at least one buffer of what a step of the channel loop loads
    columns = 0 if configs.has_long_axis(p.height, p.width) else c.tile_w * c.block_h
    lines = c.images * (columns + c.tile_h * c.block_w)
    lines = 0 if c.holds_images(p.height, p.width) else lines
    loaded = c.block_c * (pixels + 3 * c.block_n + lines)
    buffers = max(1, c.num_stages - 1)
    return (
        covers
        and pixels >= 16
        and accumulators(pixels * c.block_n, p, c.num_warps) <= ACCUMULATORS
        and loaded * p.dtype.itemsize * buffers <= chip.shared_memory
    )


def weight_grad_fits(config: WeightGradConfig, problem: Problem, chip: Chip) -> bool:
    """As :func:`mix_fits`, for the kernels of the weight gradient."""
    c, p = config, problem
    blocks = (c.proj_block_o, c.proj_block_c, c.fuse_block_o)
    if not all(is_power_of_two(b) and 16 <= b <= block_of(p.channels, b) for b in blocks):
        return False
    if not is_width(c.fuse_block_c, p.channels):
        return False
    rows_fit = c.proj_rows in ROWS and c.fuse_rows in ROWS
    if not (rows_fit and c.num_warps in WARPS and c.num_stages in STAGES):
        return False
    proj = c.proj_rows * (c.proj_rows + c.proj_block_c)
    fuse = c.fuse_block_c * (c.fuse_rows + c.fuse_block_o)
    # at least one buffer of what a step of the innermost loop loads
    proj_loads = c.proj_block_o * (c.proj_rows + c.proj_block_c)
    fuse_loads = c.fuse_rows * (c.fuse_block_o + c.fuse_block_c)
    loaded = max(proj_loads, fuse_loads) * p.dtype.itemsize * max(1, c.num_stages - 1)
    return (
        accumulators(max(proj, fuse), p, c.num_warps) <= ACCUMULATORS
        and loaded <= chip.shared_memory
        and 1 <= c.proj_splits <= MAX_PROGRAMS
        and 1 <= c.fuse_programs <= MAX_PROGRAMS
    )


def mix_neighbours(config: MixConfig, problem: Problem, chip: Chip) -> list[MixConfig]:
    """Tiles one change away that fit: a size doubled or halved, two exchanged, one more stage."""
    c = config
    changes = doubled_or_halved(c, "images", "tile_h", "tile_w", "block_c", "block_n")
    changes += doubled_or_halved(c, "num_warps") + stages(c)
    for up, down in (("block_n", "tile_h"), ("tile_h", "block_n"), ("images", "block_n")):
        changes.append({up: 2 * getattr(c, up), down: getattr(c, down) // 2})
    changes += [
        {"block_h": 2 * c.block_h, "block_w": 2 * c.block_w},
        {"block_h": c.block_h // 2, "block_w": c.block_w // 2},
    ]
    near = []
    for change in changes:
        tile_h, tile_w = change.get("tile_h", c.tile_h), change.get("tile_w", c.tile_w)
        if min(tile_h, tile_w) > 0:
            change |= {"step_h": even_step(problem.height, tile_h)}
            change |= {"step_w": even_step(problem.width, tile_w)}
            near.append(dataclasses.replace(c, **change))
    return [n for n in dict.fromkeys(near) if mix_fits(n, problem, chip)]


def weight_grad_neighbours(
    config: WeightGradConfig, problem: Problem, chip: Chip
) -> list[WeightGradConfig]:
    """As :func:`mix_neighbours`, for the kernels of the weight gradient."""
    c = config
    changes = doubled_or_halved(
        c,
        *("proj_rows", "proj_block_o", "proj_block_c"),
        *("fuse_rows", "fuse_block_o", "fuse_block_c"),
        *("num_warps", "proj_splits", "fuse_programs"),
    )
    near = [dataclasses.replace(c, **change) for change in changes + stages(c)]
    return [n for n in dict.fromkeys(near) if weight_grad_fits(n, problem, chip)]


def doubled_or_halved(config: MixConfig | WeightGradConfig, *names: str) -> list[Change]:
    sizes = [(name, getattr(config, name)) for name in names]
    return [{name: new} for name, size in sizes for new in (2 * size, size // 2)]


def stages(config: MixConfig | WeightGradConfig) -> list[Change]:
    return [{"num_stages": config.num_stages + 1}, {"num_stages": config.num_stages - 1}]


def accumulators(elements: int, problem: Problem, num_warps: int) -> int:
    """32-bit registers that a thread needs for a tile of sums."""
    words = 2 if problem.dtype == torch.float64 else 1
    return elements * words // (32 * num_warps)


def is_width(block: int, channels: int) -> bool:
    """Whether channels can be cut into blocks of this many (:func:`configs.width_of`)."""
    return block == width_of(block) <= width_of(channels)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0

"""Images as matrices [pixels, channels], dense, a chunk of a batch at a time.

This is the layout of channels_last images; other layouts are copied to it and back, by a kernel
that reads and writes along the contiguous axis on either side.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smlp_kernels.launch import INT32_MAX, PLANS, Call, Launch, Plan, Strides, cdiv

TILE_PIXELS, TILE_CHANNELS = 64, 64  # that a program copies
CHUNK_BYTES = 34_500_000  # of scratch memory, unless a single image takes more


@triton.jit
def copy_images_kernel(
    source_ptr,  # [images, C, H, W], any strides
    target_ptr,  # the same shape and type, any strides
    SOURCE_B: tl.constexpr, SOURCE_C: tl.constexpr, SOURCE_H: tl.constexpr, SOURCE_W: tl.constexpr,
    TARGET_B: tl.constexpr, TARGET_C: tl.constexpr, TARGET_H: tl.constexpr, TARGET_W: tl.constexpr,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    INDEX_64: tl.constexpr,  # offsets inside an image exceed 31 bits
):  # fmt: skip
    """A program copies some pixels and channels of an image."""
    TILES_C: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    TILES_P: tl.constexpr = (HEIGHT * WIDTH + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = pid // TILES_C % TILES_P * BLOCK_P + tl.arange(0, BLOCK_P)
    image = (pid // (TILES_C * TILES_P)).to(tl.int64)
    mask = (pixel < HEIGHT * WIDTH)[:, None] & (c < CHANNELS)[None, :]
    if INDEX_64:
        c, pixel = c.to(tl.int64), pixel.to(tl.int64)
    if HEIGHT == 1:
        source, target = pixel * SOURCE_W, pixel * TARGET_W
    else:
        h, w = pixel // WIDTH, pixel % WIDTH
        source, target = h * SOURCE_H + w * SOURCE_W, h * TARGET_H + w * TARGET_W
    source = source[:, None] + (c * SOURCE_C)[None, :]
    target = target[:, None] + (c * TARGET_C)[None, :]
    values = tl.load(source_ptr + image * SOURCE_B + source, mask=mask)
    tl.store(target_ptr + image * TARGET_B + target, values, mask=mask)


def copy_images(source: Tensor, target: Tensor, launch: Launch) -> None:
    """Copy [B, C, H, W] to another tensor of the same shape and type, with any strides."""
    plan = copy_images_plan(source.shape, source.stride(), target.stride())
    launch(Call(plan, (source, target)))


@functools.lru_cache(PLANS)
def copy_images_plan(shape: torch.Size, source: Strides, target: Strides) -> Plan:
    """The plan of ``copy_images_kernel``."""
    images, channels, height, width = shape
    # one axis of pixels where both tensors have one, so that the compiler knows what is contiguous
    if source[2] == width * source[3] and target[2] == width * target[3]:
        height, width = 1, height * width
    programs = images * cdiv(height * width, TILE_PIXELS) * cdiv(channels, TILE_CHANNELS)
    last = [
        sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:], strict=True))
        for strides in (source, target)
    ]
    return Plan(
        copy_images_kernel,
        programs,
        (),
        {
            **dict(zip(("SOURCE_B", "SOURCE_C", "SOURCE_H", "SOURCE_W"), source, strict=True)),
            **dict(zip(("TARGET_B", "TARGET_C", "TARGET_H", "TARGET_W"), target, strict=True)),
            "CHANNELS": channels,
            "HEIGHT": height,
            "WIDTH": width,
            "BLOCK_P": TILE_PIXELS,
            "BLOCK_C": TILE_CHANNELS,
            "INDEX_64": max(last) > INT32_MAX,
        },
        num_warps=4,
    )


def is_rows(images: Tensor) -> bool:
    """Whether [B, C, H, W] is a dense matrix [pixels, C]."""
    return images.is_contiguous(memory_format=torch.channels_last)


class Chunk(NamedTuple):
    """Some images of a batch, and the plans of what is launched for them."""

    first: int  # images
    end: int
    is_all: bool  # of the batch
    pixels: int
    channels: int
    plans: tuple[Plan | bool, ...]  # as smlp_kernels.kernels.axis.Axes says

    def images(self, x: Tensor) -> Tensor:
        """Its part of [B, C, H, W]."""
        return x if self.is_all else x[self.first : self.end]

    def read(self, x: Tensor, is_rows: bool, launch: Launch) -> Tensor:
        """Its part of [B, C, H, W], as it is or copied so that it ``is_rows``."""
        images = self.images(x)
        if is_rows:
            return images
        rows = torch.empty_like(images, memory_format=torch.channels_last)
        copy_images(images, rows, launch)
        return rows

    def matrix(self, images: Tensor) -> Tensor:
        """Its images, which have to be ``is_rows``, as a matrix [pixels, C]."""
        return images.as_strided((self.pixels, self.channels), (self.channels, 1))


def chunk_images(batch: int, image_bytes: int) -> int:
    """Images of a chunk, at least 1: as few chunks as ``CHUNK_BYTES`` allows, of equal sizes."""
    batch = max(1, batch)
    return cdiv(batch, cdiv(batch, max(1, CHUNK_BYTES // image_bytes)))


def chunks_of(
    shape: torch.Size, images: int, plans: Callable[[int, bool], tuple[Plan | bool, ...]]
) -> tuple[Chunk, ...]:
    """The chunks of a batch; ``plans`` takes the images of each and whether it is the first."""
    batch, channels, height, width = shape

    def chunk_from(first: int) -> Chunk:
        end = min(first + images, batch)
        pixels = (end - first) * height * width
        return Chunk(first, end, images == batch, pixels, channels, plans(end - first, first == 0))

    return tuple(map(chunk_from, range(0, batch, images)))

"""Images as matrices [pixels, channels], dense, a chunk of a batch at a time.

That is how channels_last images lie in memory; other layouts are copied there and back, by a kernel
that reads and writes along what is contiguous on either side.
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
CHUNK_BYTES = 32_000_000  # of scratch memory, unless a single image takes more


@triton.jit(do_not_specialize=["images"])  # a new batch size: no new kernel
def copy_images_kernel(
    source_ptr,  # [images, C, H, W], any strides
    target_ptr,  # the same shape and type, any strides
    images,
    source_b, source_c, source_h, source_w,
    target_b, target_c, target_h, target_w,
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
        source, target = pixel * source_w, pixel * target_w
    else:
        h, w = pixel // WIDTH, pixel % WIDTH
        source, target = h * source_h + w * source_w, h * target_h + w * target_w
    source = source[:, None] + (c * source_c)[None, :]
    target = target[:, None] + (c * target_c)[None, :]
    values = tl.load(source_ptr + image * source_b + source, mask=mask)
    tl.store(target_ptr + image * target_b + target, values, mask=mask)


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
        (images, *source, *target),
        {
            "CHANNELS": channels,
            "HEIGHT": height,
            "WIDTH": width,
            "BLOCK_P": TILE_PIXELS,
            "BLOCK_C": TILE_CHANNELS,
            "INDEX_64": max(last) > INT32_MAX,
        },
        num_warps=4,
    )


def is_rows(x: Tensor) -> bool:
    """Whether [B, C, H, W] is a dense matrix [pixels, C]."""
    return x.is_contiguous(memory_format=torch.channels_last)


class Chunk(NamedTuple):
    """Some images of a batch, and the plans of what is launched for them."""

    first: int  # images
    end: int
    size: tuple[int, int, int]  # C, H, W
    pixels: int
    is_first: bool
    is_short: bool  # of fewer images than the others
    plans: tuple[Plan | None, ...]

    def view(self, x: Tensor) -> Tensor:
        """Its part of a tensor that ``is_rows``, as a matrix [pixels, C]."""
        channels = self.size[0]
        offset = x.storage_offset()
        if self.first:
            offset += self.first * x.stride(0)
        return x.as_strided((self.pixels, channels), (channels, 1), offset)

    def read(self, x: Tensor, is_rows: bool, launch: Launch) -> Tensor:
        """Its part of any tensor [B, C, H, W] as a matrix [pixels, C]: a view or a copy."""
        if is_rows:
            return self.view(x)
        rows = x.new_empty(self.pixels, self.size[0])
        copy_images(x[self.first : self.end], self.images(rows), launch)
        return rows

    def write(self, rows: Tensor, x: Tensor, launch: Launch) -> None:
        """Copy a matrix [pixels, C] to its part of [B, C, H, W]."""
        copy_images(self.images(rows), x[self.first : self.end], launch)

    def images(self, rows: Tensor) -> Tensor:
        """A matrix [pixels, C] as a view [B, C, H, W]."""
        return rows.unflatten(0, (-1, *self.size[1:])).permute(0, 3, 1, 2)


def chunk_images(batch: int, image_bytes: int) -> int:
    """Images of a chunk: as few chunks as ``CHUNK_BYTES`` allow, of equal sizes."""
    return cdiv(batch, cdiv(batch, max(1, CHUNK_BYTES // image_bytes)))


def chunks_of(
    shape: torch.Size, images: int, plans: Callable[[int, bool], tuple[Plan | None, ...]]
) -> tuple[Chunk, ...]:
    """The chunks of a batch; ``plans`` is asked with the pixels of each and if it is the first."""
    batch, *size = shape

    def chunk_from(first: int) -> Chunk:
        end = min(first + images, batch)
        pixels = (end - first) * size[1] * size[2]
        is_short = end - first < images
        return Chunk(
            first, end, tuple(size), pixels, first == 0, is_short, plans(pixels, first == 0)
        )

    return tuple(map(chunk_from, range(0, batch, images)))

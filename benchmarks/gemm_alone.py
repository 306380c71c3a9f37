"""The channel product of the fused kernel alone, with the fused kernel's own tile.

y[M, N] = x[M, K] @ w[N, K]^T with M = B * H * W, K = 3C, N = C and the tile that the configuration
table gives the shape: if this is far from cuBLAS, the tile is the problem and not the fusion.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import timing
from benchmarks.providers import ERROR_BOUNDS
from benchmarks.recorder import Context
from benchmarks.roofline import floor_us
from benchmarks.shapes import BY_NAME, Shape
from benchmarks.tiles import forward_tile

SHAPES = tuple(BY_NAME[f"base-{side}"] for side in (14, 28, 56, 7))  # the largest network's


class Tile(NamedTuple):
    """What one program computes, and how."""

    rows: int  # a power of two
    columns: int  # one or two powers of two, as in the fused kernel
    depth: int  # a power of two: of one step
    num_warps: int
    num_stages: int


@triton.jit
def product_kernel(
    x_ptr,  # [M, K] row-major
    w_ptr,  # [N, K] row-major
    y_ptr,  # [M, N] row-major
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST_N: tl.constexpr,  # columns of the tile beyond BLOCK_N, which is a power of two; may be 0
    BLOCK_K: tl.constexpr,
):
    """One program per tile; the tiles of a row of x run next to each other, as in the block."""
    TILES_N: tl.constexpr = (N + BLOCK_N + REST_N - 1) // (BLOCK_N + REST_N)
    pid = tl.program_id(0)
    m = (pid // TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (pid % TILES_N) * (BLOCK_N + REST_N)
    n = first + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if REST_N:
        rest_n = first + BLOCK_N + tl.arange(0, REST_N)
        rest = tl.zeros((BLOCK_M, REST_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + m[:, None].to(tl.int64) * K + k[None, :],
            mask=(m < M)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, weights(w_ptr, k, n, N, K), acc)
        if REST_N:
            rest = tl.dot(x, weights(w_ptr, k, rest_n, N, K), rest)
    store(y_ptr, m, n, acc, M, N)
    if REST_N:
        store(y_ptr, m, rest_n, rest, M, N)


@triton.jit
def weights(w_ptr, k, n, N: tl.constexpr, K: tl.constexpr):
    """w^T at ``[k, n]``."""
    mask = (k < K)[:, None] & (n < N)[None, :]
    return tl.load(w_ptr + n[None, :] * K + k[:, None], mask=mask, other=0.0)


@triton.jit
def store(y_ptr, m, n, values, M, N: tl.constexpr):
    """Write y at ``[m, n]``."""
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(
        y_ptr + m[:, None].to(tl.int64) * N + n[None, :],
        values.to(y_ptr.dtype.element_ty),
        mask=mask,
    )


def product(x: Tensor, w: Tensor, tile: Tile) -> Tensor:
    """``x [M, K] @ w [N, K]^T`` by :func:`product_kernel`."""
    if w.shape[1] != x.shape[1] or not (x.is_contiguous() and w.is_contiguous()):
        raise ValueError(
            f"w: expected contiguous [N, {x.shape[1]}] and contiguous x, got {list(w.shape)}"
        )
    y = torch.empty(x.shape[0], w.shape[0], device=x.device, dtype=x.dtype)
    programs, arguments, options = launch(x, w, y, tile)
    product_kernel[(programs,)](*arguments, **options)
    return y


def launch(
    x: Tensor, w: Tensor, y: Tensor, tile: Tile
) -> tuple[int, tuple[Any, ...], dict[str, int]]:
    """Number of programs, arguments and options of :func:`product_kernel`."""
    (rows, depth), columns = x.shape, w.shape[0]
    block_n = 1 << tile.columns.bit_length() - 1  # the largest power of two in it
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    sizes = (rows, columns, depth, tile.rows, block_n, tile.columns - block_n, tile.depth)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return programs, (x, w, y, *sizes), options


def operands(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Random x ``[BHW, 3C]`` and w ``[C, 3C]`` in bfloat16."""
    depth = 3 * shape.channels
    x = torch.randn(shape.pixels, depth, device=device, dtype=torch.bfloat16)
    return x, torch.randn(shape.channels, depth, device=device, dtype=torch.bfloat16)


def tile_of(shape: Shape, arch: int) -> Tile:
    """The tile of the fused kernel for ``shape`` in bfloat16 and channels_last."""
    config = forward_tile(shape, "bf16", arch)
    rows = config.images * config.tile_h * config.tile_w
    return Tile(rows, config.block_n, config.block_c, config.num_warps, config.num_stages)


def gemm_alone(context: Context) -> dict[str, Any]:
    """The product at the four stages of the largest network: fused kernel's tile and cuBLAS."""
    ceilings = context.measured_ceilings()
    failures = context.so_far["failures"] = {}
    for shape in SHAPES:
        floor = floor_us(shape, "fwd", "bf16", ceilings)
        found = context.so_far[shape.name] = {**_measure(shape), "floor": floor}
        if not found["error"] <= ERROR_BOUNDS["bf16"]:  # written so that NaN fails
            failures[shape.name] = f"off by {found['error']:.1e}"
    return context.so_far


def _measure(shape: Shape) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    tile = tile_of(shape, 10 * major + minor)
    x, w = operands(shape, "cuda")
    expected = (x @ w.t()).float()
    error = (product(x, w, tile).float() - expected).norm()
    return {
        "tile": tile,
        "error": (error / expected.norm()).item(),
        "triton_us": timing.event_us(lambda: product(x, w, tile)),
        "cublas_us": timing.event_us(lambda: x @ w.t()),
    }

"""The channel product of the fused kernel alone, with the fused kernel's own tile.

y[M, N] = x[M, K] @ w[K, N] with M = B * H * W, K = 3C, N = C and the tile that the configuration
table gives the shape: if this is far from cuBLAS, the tile is the problem and not the fusion.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import timing
from benchmarks.model import forward_configs
from benchmarks.recorder import Context
from benchmarks.roofline import floor_us
from benchmarks.shapes import BY_NAME, Shape


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
    BLOCK_K: tl.constexpr,
):
    """One program per tile; the tiles of a row of x run next to each other, as in the block."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    m = (pid // TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + m[:, None].to(tl.int64) * K + k[None, :],
            mask=(m < M)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + n[None, :] * K + k[:, None],
            mask=(n < N)[None, :] & (k < K)[:, None],
            other=0.0,
        )
        acc = tl.dot(x, w, acc)
    tl.store(
        y_ptr + m[:, None].to(tl.int64) * N + n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (n < N)[None, :],
    )


def product(
    x: Tensor, w: Tensor, tile: tuple[int, int, int], num_warps: int, num_stages: int
) -> Tensor:
    """``x [M, K] @ w [N, K]^T`` by :func:`product_kernel`; ``tile`` is (M, N, K) of a program."""
    (rows, depth), columns = x.shape, w.shape[0]
    if w.shape[1] != depth or not (x.is_contiguous() and w.is_contiguous()):
        raise ValueError(
            f"w: expected contiguous [N, {depth}] and contiguous x, got {list(w.shape)}"
        )
    y = torch.empty(rows, columns, device=x.device, dtype=x.dtype)
    grid = (triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]),)
    product_kernel[grid](
        x, w, y, rows, columns, depth, *tile, num_warps=num_warps, num_stages=num_stages
    )
    return y


def gemm_alone(context: Context) -> dict[str, Any]:
    """The product at the four stages of the largest network: fused kernel's tile and cuBLAS."""
    names = ("base-14", "base-28", "base-56", "base-7")
    ceilings = context.measured_ceilings()
    return {
        name: {**_measure(BY_NAME[name]), "floor": floor_us(BY_NAME[name], "fwd", "bf16", ceilings)}
        for name in names
    }


def _measure(shape: Shape) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    (config,) = forward_configs(shape, "bf16", 10 * major + minor)
    tile = (config.images * config.tile_h * config.tile_w, config.block_n, config.block_c)
    x = torch.randn(shape.pixels, 3 * shape.channels, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(shape.channels, 3 * shape.channels, device="cuda", dtype=torch.bfloat16)
    expected = (x @ w.t()).float()
    error = (product(x, w, tile, config.num_warps, config.num_stages).float() - expected).norm()
    return {
        "tile": tile,
        "error": (error / expected.norm()).item(),
        "triton_us": timing.event_us(
            lambda: product(x, w, tile, config.num_warps, config.num_stages)
        ),
        "cublas_us": timing.event_us(lambda: x @ w.t()),
    }

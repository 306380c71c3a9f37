"""Kernels of a few lines: one that Triton's pipeliner breaks, one to be broken on purpose."""

import torch
import triton
import triton.language as tl

from tests.ptx.blocks import Outcome, faults
from tests.ptx.chip import Change, Chip

M, N, K, BLOCK = 128, 64, 160, 32
ROWS = 100  # of M, where rows are masked


@triton.jit
def two_uses(
    x_ptr,  # [M, K]
    w_ptr,  # [K, N]
    v_ptr,  # [K, N]
    y_ptr,  # [M, N]
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PENDING_LAST: tl.constexpr,
):
    """y = (x + 0.1) v + x w: x is read to be added to, and is an operand in shared memory.

    Triton gives such a tile no extra buffer on Hopper (triton-lang/triton#6691). If the product
    that reads it is the last of a step it is left pending, and the copy for a later step writes
    over its operand. If the other product is the last one, nothing is wrong.
    """
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + m[:, None] * K + (start + k)[None, :])  # [M, BLOCK]
        w = tl.load(w_ptr + (start + k)[:, None] * N + n[None, :])  # [BLOCK, N]
        v = tl.load(v_ptr + (start + k)[:, None] * N + n[None, :])  # [BLOCK, N]
        if PENDING_LAST:
            acc = tl.dot((x.to(tl.float32) + 0.1).to(x.dtype), v, acc)
            acc = tl.dot(x, w, acc)
        else:
            acc = tl.dot(x, w, acc)
            acc = tl.dot((x.to(tl.float32) + 0.1).to(x.dtype), v, acc)
    tl.store(y_ptr + m[:, None] * N + n[None, :], acc)


@triton.jit
def masked_product(
    x_ptr,  # [ROWS, K]
    w_ptr,  # [K, N]
    bias_ptr,  # [ROWS]
    y_ptr,  # [N, ROWS]
    ROWS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = (x w + bias)': copies in flight, products, masks, a change of layout."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    rows = m < ROWS
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + m[:, None] * K + (start + k)[None, :], mask=rows[:, None], other=0.0)
        w = tl.load(w_ptr + (start + k)[:, None] * N + n[None, :])  # [BLOCK, N]
        acc = tl.dot(x, w, acc)
    acc += tl.load(bias_ptr + m, mask=rows, other=0.0)[:, None]
    tl.store(y_ptr + n[:, None] * ROWS + m[None, :], tl.trans(acc), mask=rows[None, :])


def run_race() -> Outcome:
    """A problem if the race is not seen, or if one is seen where there is none."""
    torch.manual_seed(0)
    x, w, v = (torch.randn(*shape).bfloat16() for shape in ((M, K), (K, N), (K, N)))
    want = x.double() @ w.double() + (x.float() + 0.1).bfloat16().double() @ v.double()
    problems = []
    for pending_last in (True, False):
        chip = Chip(90)
        with chip.active():
            y = torch.empty(M, N)
            two_uses[(1,)](x, w, v, y, K, M, N, BLOCK, pending_last, num_warps=4, num_stages=3)
        wrong = bool((y.double() - want).abs().max() > 1e-3 * want.abs().max())
        seen = faults(chip)
        raced = any("write over an operand of a wgmma in flight" in text for text in seen)
        if (wrong, raced) != (pending_last, pending_last):
            problems.append(f"{pending_last=}: {wrong=}, violations {seen}")
    return Outcome(problems, {}, 2)


def run_masked_product(arch: int, change: Change | None = None) -> list[str]:
    """What is wrong with :func:`masked_product`."""
    torch.manual_seed(0)
    x, w = torch.randn(ROWS, K).bfloat16(), torch.randn(K, N).bfloat16()
    bias = torch.randn(ROWS)
    chip = Chip(arch, change=change)
    with chip.active():
        y = torch.empty(N, ROWS)
        masked_product[(1,)](x, w, bias, y, ROWS, K, M, N, BLOCK, num_warps=4, num_stages=3)
    want = (x.double() @ w.double() + bias.double()[:, None]).T
    found = faults(chip)
    if not torch.allclose(y.double(), want, rtol=1e-3, atol=1e-3):
        found.append("wrong value")
    return found

"""A race that Triton's pipeliner makes (triton-lang/triton#6691), in a kernel of a few lines.

A tile that a wgmma reads from shared memory, and that something else reads too, gets no extra
buffer. If that product is the last of a step it is left pending, and the copy for a later step
writes over its operand. If another product is the last one, nothing is wrong.
"""

import torch
import triton
import triton.language as tl

from tests.ptx.blocks import Outcome, faults
from tests.ptx.chip import Chip

M, N, K, BLOCK = 128, 64, 256, 32


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
    """y = (x + 0.1) v + x w: x is read to be added to, and is an operand in shared memory."""
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


def run_race() -> Outcome:
    """A problem if the race is not seen, or if one is seen where there is none."""
    torch.manual_seed(0)
    x, w, v = torch.randn(M, K), torch.randn(K, N), torch.randn(K, N)
    x, w, v = x.bfloat16(), w.bfloat16(), v.bfloat16()
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

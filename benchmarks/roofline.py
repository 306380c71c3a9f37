"""The least time a pass over the block can take, from bytes, multiply-adds and two measured rates.

For x ``[B, C, H, W]`` the block costs, per image, ``HWC(H + W)`` multiply-adds for the two axis
projections and ``3 HWC^2`` for the channel product (section 3.2 of arXiv 2109.05422, without the
depthwise convolution in front). Memory is counted as if nothing were ever moved twice:

========  =============================================  ==============================
pass      bytes                                          multiply-adds
========  =============================================  ==============================
forward   read x, write y, read the weights              HWC(H + W) + 3 HWC^2 per image
backward  read x and dy, write dx; read the weights and  twice the forward's: dx costs a
          write their gradients                          forward, the weights' gradients
                                                         another; nothing recomputed
both      forward + backward: y leaves the chip before   the sum
          the loss can return dy
========  =============================================  ==============================

A floor is the larger of bytes / copy bandwidth and flops / matrix rate. Both rates are what this
GPU reaches on a large copy and on large matrix products, measured in the same run as whatever is
compared with the floor, never a datasheet's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks import timing
from benchmarks.shapes import DTYPES, Shape, expect

COPY_BYTES = 2 << 30  # far beyond any L2
LONG = {"warmup": 50, "rep": 200}  # milliseconds of each measurement
GEMM_SIZE = 8192  # 1.1 TFLOP: over a millisecond, so launch and tail effects vanish
PASSES = ("inference", "fwd", "bwd", "fwd+bwd")
# how often x's and the weights' bytes move, and how many forwards' multiply-adds it takes
COSTS = {"inference": (2, 1, 1), "fwd": (2, 1, 1), "bwd": (3, 2, 2)}


@dataclass(frozen=True)
class Ceilings:
    """The rates that the device reaches on the two simplest jobs.

    Attributes:
        copy_bytes_per_s: bytes read plus bytes written per second of a large device copy.
        gemm_flops_per_s: by dtype name, twice the multiply-adds per second of a large product.
        device: where they were measured.
    """

    copy_bytes_per_s: float
    gemm_flops_per_s: dict[str, float]
    device: str

    def __str__(self) -> str:
        rates = ", ".join(
            f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in self.gemm_flops_per_s.items()
        )
        return (
            f"ceilings measured on {self.device}: "
            f"copy {self.copy_bytes_per_s / 1e12:.2f} TB/s, products {rates}"
        )


def weight_elements(shape: Shape) -> int:
    """Elements of proj_h, proj_w and fuse together, biases included."""
    height, width, channels = shape.height, shape.width, shape.channels
    return height * (height + 1) + width * (width + 1) + channels * (3 * channels + 1)


def io_bytes(shape: Shape, pass_: str, dtype: str) -> int:
    """Bytes that ``inference``, ``fwd`` or ``bwd`` must move through device memory."""
    tensors, weights, _ = COSTS[pass_]
    return (tensors * shape.elements + weights * weight_elements(shape)) * DTYPES[dtype].itemsize


def flops(shape: Shape, pass_: str) -> int:
    """Floating-point operations (two per multiply-add) of ``inference``, ``fwd`` or ``bwd``."""
    per_element = shape.height + shape.width + 3 * shape.channels
    return 2 * shape.elements * per_element * COSTS[pass_][2]


def floor_us(shape: Shape, pass_: str, dtype: str, ceilings: Ceilings) -> float:
    """The floor of any of :data:`PASSES` in microseconds; ``fwd+bwd`` is one after the other."""
    if pass_ == "fwd+bwd":
        return sum(floor_us(shape, part, dtype, ceilings) for part in ("fwd", "bwd"))
    memory = io_bytes(shape, pass_, dtype) / ceilings.copy_bytes_per_s
    return 1e6 * max(memory, flops(shape, pass_) / ceilings.gemm_flops_per_s[dtype])


@contextmanager
def matmul_precision(dtype: str) -> Iterator[None]:
    """Let float32 products use TF32 when ``dtype`` is ``"tf32"``, IEEE arithmetic otherwise.

    Sets torch's float32 matmul precision and cuDNN's switch for convolutions; puts both back.
    """
    expect("dtype", dtype, DTYPES)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def measure_ceilings(dtypes: Sequence[str] = tuple(DTYPES)) -> Ceilings:
    """Median copy bandwidth and matrix rate of the current GPU on random data."""
    rates = {dtype: _gemm_flops_per_s(dtype) for dtype in dtypes}
    return Ceilings(_copy_bytes_per_s(), rates, torch.cuda.get_device_name())


def _copy_bytes_per_s() -> float:
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = timing.event_us(lambda: target.copy_(source), **LONG)
    return 2e6 * COPY_BYTES / us


def _gemm_flops_per_s(dtype: str) -> float:
    # IEEE float32 runs on the ordinary cores, some 15 times slower: a smaller product will do
    size = GEMM_SIZE // 2 if dtype == "fp32" else GEMM_SIZE
    a, b = (torch.randn(size, size, device="cuda", dtype=DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    with matmul_precision(dtype):
        return 2e6 * size**3 / timing.event_us(lambda: torch.mm(a, b, out=out), **LONG)

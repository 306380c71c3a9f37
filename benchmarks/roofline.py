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

A floor is the larger of bytes / copy bandwidth and flops / matrix rate. Both rates are measured in
the same run as whatever is compared with the floor (see :mod:`benchmarks.ceilings`).
"""

from dataclasses import dataclass

from benchmarks.shapes import DTYPES, Shape

PASSES = ("inference", "fwd", "bwd", "fwd+bwd")


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches on the two simplest jobs.

    Attributes:
        copy_bytes_per_s: bytes read plus bytes written per second of a large device copy.
        gemm_flops_per_s: by dtype name, twice the multiply-adds per second of a large product.
        device: where they were measured.
    """

    copy_bytes_per_s: float
    gemm_flops_per_s: dict[str, float]
    device: str

    def __post_init__(self) -> None:
        rates = {"copy_bytes_per_s": self.copy_bytes_per_s, **self.gemm_flops_per_s}
        for name, rate in rates.items():
            if not rate > 0:
                raise ValueError(f"{name}: expected a positive rate, got {rate}")

    def matrix_rate(self, dtype: str) -> float:
        """Flops per second for ``dtype``; a ValueError names the dtypes that were measured."""
        if dtype not in self.gemm_flops_per_s:
            known = ", ".join(self.gemm_flops_per_s) or "none"
            raise ValueError(f"dtype: expected one that was measured ({known}), got {dtype!r}")
        return self.gemm_flops_per_s[dtype]


@dataclass(frozen=True)
class Floor:
    """Microseconds below which a pass cannot fall, and what they are made of."""

    memory_us: float
    matrix_us: float

    @property
    def us(self) -> float:
        return max(self.memory_us, self.matrix_us)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_us >= self.matrix_us else "matrix"


def weight_elements(shape: Shape) -> int:
    """Elements of proj_h, proj_w and fuse together, biases included."""
    height, width, channels = shape.height, shape.width, shape.channels
    return height * (height + 1) + width * (width + 1) + channels * (3 * channels + 1)


def io_bytes(shape: Shape, pass_: str, dtype: str) -> int:
    """Bytes that ``inference``, ``fwd`` or ``bwd`` must move through device memory."""
    tensors, weights = {"inference": (2, 1), "fwd": (2, 1), "bwd": (3, 2)}[_single(pass_)]
    return (tensors * shape.elements + weights * weight_elements(shape)) * itemsize(dtype)


def flops(shape: Shape, pass_: str) -> int:
    """Floating-point operations (two per multiply-add) of ``inference``, ``fwd`` or ``bwd``."""
    per_element = shape.height + shape.width + 3 * shape.channels
    return 2 * shape.elements * per_element * {"inference": 1, "fwd": 1, "bwd": 2}[_single(pass_)]


def floor(shape: Shape, pass_: str, dtype: str, ceilings: Ceilings) -> Floor:
    """The floor of ``inference``, ``fwd`` or ``bwd``."""
    return Floor(
        1e6 * io_bytes(shape, pass_, dtype) / ceilings.copy_bytes_per_s,
        1e6 * flops(shape, pass_) / ceilings.matrix_rate(dtype),
    )


def floor_us(shape: Shape, pass_: str, dtype: str, ceilings: Ceilings) -> float:
    """The floor of any of :data:`PASSES` in microseconds; ``fwd+bwd`` is one after the other."""
    parts = ("fwd", "bwd") if pass_ == "fwd+bwd" else (pass_,)
    return sum(floor(shape, part, dtype, ceilings).us for part in parts)


def itemsize(dtype: str) -> int:
    """Bytes per element of a dtype name of :data:`benchmarks.shapes.DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype].itemsize


def _single(pass_: str) -> str:
    if pass_ not in PASSES or pass_ == "fwd+bwd":
        raise ValueError(f"pass_: expected inference, fwd or bwd, got {pass_!r}")
    return pass_

"""Measure what this GPU reaches on a large copy and on large matrix products.

Every share of a floor is taken of these two numbers from the same run, never of a datasheet's::

    python -m benchmarks.ceilings [--json FILE]
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.roofline import Ceilings
from benchmarks.shapes import DTYPES

COPY_BYTES = 2 << 30  # far beyond any L2
GEMM_SIZE = 8192  # 1.1 TFLOP: over a millisecond, so launch and tail effects vanish


@contextmanager
def matmul_precision(dtype: str) -> Iterator[None]:
    """Let float32 products use TF32 when ``dtype`` is ``"tf32"``, IEEE arithmetic otherwise.

    Sets torch's float32 matmul precision and cuDNN's switch for convolutions; puts both back.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def measure_ceilings(dtypes: tuple[str, ...] = tuple(DTYPES), device: str = "cuda") -> Ceilings:
    """Median copy bandwidth and matrix rate of ``device`` on random data.

    Raises:
        RuntimeError: without a GPU, since a floor of another machine would mean nothing.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("ceilings: an NVIDIA GPU is needed, torch.cuda.is_available() is False")
    with torch.cuda.device(device):
        rates = {dtype: _gemm_flops_per_s(dtype, device) for dtype in dtypes}
        return Ceilings(_copy_bytes_per_s(device), rates, torch.cuda.get_device_name(device))


def _copy_bytes_per_s(device: str) -> float:
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median_seconds(lambda: target.copy_(source))


def _gemm_flops_per_s(dtype: str, device: str) -> float:
    # IEEE float32 runs on the ordinary cores, some 15 times slower: a smaller product will do
    size = GEMM_SIZE // 2 if dtype == "fp32" else GEMM_SIZE
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    with matmul_precision(dtype):
        return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b, out=out))


def _median_seconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench  # needs a driver when used, so never at import

    return do_bench(call, warmup=50, rep=200, return_mode="median") / 1e3


def describe(ceilings: Ceilings) -> str:
    """The ceilings in one line, for the head of every table."""
    rates = ", ".join(
        f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in ceilings.gemm_flops_per_s.items()
    )
    return (
        f"ceilings measured on {ceilings.device}: "
        f"copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, products {rates}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    arguments = parser.parse_args()
    try:
        ceilings = measure_ceilings()
    except RuntimeError as reason:
        raise SystemExit(f"skipped: {reason}") from None
    print(describe(ceilings))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(ceilings), indent=2) + "\n")


if __name__ == "__main__":
    main()

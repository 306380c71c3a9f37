"""``check_block``: are the kernels right on this machine?

The formula and the error that is allowed are those of :mod:`smlp.testing`.
"""

from functools import partial

import torch

from smlp.block import positive_int
from smlp.testing import (
    EPS,
    TF32_EPS,
    BlockReport,
    Comparison,
    assert_close,
    compare,
    compare_block,
    formula,
    random_arguments,
)
from smlp_kernels.functional import fallback_reason, fused_smlp
from smlp_kernels.launch import INTERPRETED, input_precision

__all__ = ["BlockReport", "Comparison", "assert_close", "check_block", "compare", "formula"]


def check_block(
    height: int,
    width: int,
    channels: int,
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
    memory_format: torch.memory_format = torch.channels_last,
    bias: bool = True,
    seed: int = 0,
) -> BlockReport:
    """Compare a block on the kernels, output and all gradients, with its formula in float64.

    The bounds are those of this package's own tests, derived from the errors that PyTorch makes on
    the same device at the same precision (:func:`compare`). Both compute products of float32 as
    ``torch.backends.cuda.matmul.fp32_precision`` says, IEEE or TF32.

    Args:
        height: H of the block.
        width: W.
        channels: C.
        batch: B of the random input.
        dtype: of the input and the weights.
        device: where the block runs; a CPU only in Triton's interpreter.
        memory_format: of the input and of the incoming gradient.
        bias: whether the block has its three biases.
        seed: of the random input, weights and incoming gradient.

    Returns:
        The errors of every result, all of which are equal to rounding.

    Raises:
        ValueError: if a size is not positive, if the device cannot be used, or if such a block
            would run on PyTorch, with the reason.
        TypeError: if a size is not an integer.
        AssertionError: if a result is not equal to rounding; its message is the report.
    """
    named = {"batch": batch, "height": height, "width": width, "channels": channels}
    batch, height, width, channels = (positive_int(*item) for item in named.items())
    try:
        empty = torch.empty(batch, channels, height, width, dtype=dtype, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device: {str(device)!r} cannot be used: {error}") from error
    if reason := fallback_reason(empty):
        raise ValueError(
            f"device, dtype, sizes: expected a block that runs on the kernels, but {reason}"
        )
    random = partial(random_arguments, batch, height, width, channels, dtype, device=device)
    (x, weights), (dy, _) = random(bias=bias, seed=seed), random(seed=seed + 1)
    x, dy = (t.contiguous(memory_format=memory_format) for t in (x, dy))
    for argument in (x, *weights):
        if argument is not None:
            argument.requires_grad_()
    as_tf32 = input_precision(dtype) == "tf32"
    eps = TF32_EPS if as_tf32 else EPS[dtype]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        results = compare_block(fused_smlp, [x, *weights], dy, eps=eps)
    gpu = torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type
    report = BlockReport(
        f"block {height}x{width}, {channels} channels, batch {batch}, "
        f"{str(dtype).removeprefix('torch.')}{' as TF32' if as_tf32 else ''}, "
        + ("in Triton's interpreter" if INTERPRETED else f"on {gpu}"),
        tuple(results),
    )
    if not report.is_right:
        raise AssertionError(f"the kernels are wrong here, please report it:\n{report}")
    return report

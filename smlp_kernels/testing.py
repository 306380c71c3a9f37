"""``check_block``: are the kernels right on this machine?

With what it is decided by, from :mod:`smlp.testing`: the formula, and the error that is allowed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smlp.sizes import positive_int
from smlp.testing import (
    EPS,
    NAMES,
    PRECISIONS,
    Comparison,
    assert_close,
    compare,
    formula,
    random_arguments,
    reduction,
    relative_error,
    squared,
    to_float64,
)
from smlp_kernels.functional import fallback_reason, fused_smlp
from smlp_kernels.launch import INTERPRETED, input_precision

__all__ = [
    "EPS",
    "NAMES",
    "PRECISIONS",
    "BlockReport",
    "Comparison",
    "assert_close",
    "check_block",
    "compare",
    "formula",
    "relative_error",
]


@dataclass(frozen=True)
class BlockReport:
    """What :func:`check_block` found; ``str`` is a table of it.

    Attributes:
        block: size, type and device, in words.
        results: the output, then the gradients of ``x`` and of each weight and bias.
    """

    block: str
    results: tuple[Comparison, ...]

    @property
    def is_right(self) -> bool:
        """Whether every result is equal to rounding."""
        return all(result.problem is None for result in self.results)

    def __str__(self) -> str:
        lines = [
            self.block,
            "relative error, Frobenius norm, against float64:",
            f"{'':24}{'kernels':>9}{'PyTorch':>9}",
        ]
        for result in self.results:
            peer = "" if result.peer_error is None else f"{result.peer_error:.1e}"
            verdict = result.problem or "equal to rounding"
            lines.append(f"{result.name:24}{result.error:9.1e}{peer:>9}  {verdict}")
        return "\n".join(lines)


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

    The bounds are those that this package's own tests hold the kernels to: the errors that PyTorch
    makes on the same device at the same precision, and a few roundings (:func:`compare`). Products
    of float32 are IEEE or TF32 as ``torch.backends.cuda.matmul.fp32_precision`` says, for both.

    Args:
        height: H of the block.
        width: W.
        channels: C.
        batch: B of the random input.
        dtype: of the input and the weights.
        device: where the block runs; a CPU in Triton's interpreter alone.
        memory_format: of the input and of the incoming gradient.
        bias: whether the block has its three biases.
        seed: of the random input, weights and incoming gradient.

    Returns:
        The errors of every result; all of them are equal to rounding.

    Raises:
        ValueError: if a size is not positive, if the device cannot be used, or if such a block
            would run on PyTorch, with the reason.
        TypeError: if a size is no integer.
        AssertionError: if a result is not equal to rounding; its message is the report.
    """
    sizes = (
        positive_int("batch", batch),
        positive_int("height", height),
        positive_int("width", width),
        positive_int("channels", channels),
    )
    batch, height, width, channels = sizes
    try:
        empty = torch.empty(batch, channels, height, width, dtype=dtype, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device: {str(device)!r} cannot be used: {error}") from error
    if reason := fallback_reason(empty):
        raise ValueError(
            f"device, dtype, sizes: expected a block that runs on the kernels, but {reason}"
        )
    x, weights = random_arguments(*sizes, dtype, device=device, bias=bias, seed=seed)
    dy, _ = random_arguments(*sizes, dtype, device=device, seed=seed + 1)
    x, dy = (t.contiguous(memory_format=memory_format) for t in (x, dy))
    arguments = [x, *weights]
    for argument in arguments:
        if argument is not None:
            argument.requires_grad_()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        actual = training_step(fused_smlp, arguments, dy)
        exact = training_step(formula, to_float64(arguments), dy.double())
        peer = training_step(formula, arguments, dy)
        terms = training_step(formula, squared(arguments), dy.double().square())
    products = input_precision(dtype)
    eps = next(p.eps for p in PRECISIONS.values() if (p.dtype, p.products) == (dtype, products))
    results = [
        compare(
            value,
            exact[name],
            peer[name],
            eps=eps,
            name=name if name == "output" else f"gradient of {name}",
            reduction=reduction(name, *sizes),
            terms=terms[name].sqrt(),
        )
        for name, value in actual.items()
    ]
    place = "in Triton's interpreter" if INTERPRETED else f"on {device_name(x.device)}"
    report = BlockReport(
        f"block {height}x{width}, {channels} channels, batch {batch}, "
        f"{str(dtype).removeprefix('torch.')}{' as TF32' if products == 'tf32' else ''}, {place}",
        tuple(results),
    )
    if not report.is_right:
        raise AssertionError(f"the kernels are wrong here, please report it:\n{report}")
    return report


def training_step(
    function: Callable[..., Tensor], arguments: list[Tensor | None], dy: Tensor
) -> dict[str, Tensor]:
    """Output and gradients of a function of a block's arguments, by name."""
    y = function(*arguments)
    given = {n: a for n, a in zip(NAMES, arguments, strict=True) if a is not None}
    gradients = torch.autograd.grad(y, list(given.values()), dy)
    return {"output": y.detach(), **dict(zip(given, gradients, strict=True))}


def device_name(device: torch.device) -> str:
    """The GPU's own name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

"""``fused_smlp``, the block as a function: checks, autocast, then the kernels or PyTorch."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from smlp.block import require_dense
from smlp.testing import NAMES
from smlp_kernels import ops
from smlp_kernels.launch import INTERPRETED, arch_of

MAX_SIZE = 256  # largest H and W on the kernels
MAX_CHANNELS = 2048  # largest C on the kernels
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MIN_ARCH = 80  # Ampere: the first chips with bfloat16 and TF32


def fused_smlp(
    x: Tensor,
    weight_h: Tensor,
    bias_h: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    weight_fuse: Tensor,
    bias_fuse: Tensor | None,
) -> Tensor:
    """The sMLP block (arXiv 2109.05422, section 3.2), fused.

    Computes what :func:`smlp.block.smlp` computes::

        x_h[b, c, h, w] = sum_k weight_h[h, k] * x[b, c, k, w] + bias_h[h]
        x_w[b, c, h, w] = sum_k weight_w[w, k] * x[b, c, h, k] + bias_w[w]
        out[b, :, h, w] = weight_fuse @ concat(x_h, x_w, x)[b, :, h, w] + bias_fuse

    One kernel projects along both axes, then cuBLAS computes the product, a chunk of the batch at a
    time. A chunk takes at most 34.5 MB of scratch memory, or what one image needs. An axis of more
    than 64 positions (128 in 16-bit types, 32 in a float64 backward) is projected by PyTorch's
    products. ``x`` is all that is kept for the backward pass. On compute capability 9.0, 16-bit
    channels_last images of some sizes have special kernels (DESIGN.md says which).

    On a CUDA GPU of compute capability 8.0 or later this runs on Triton kernels, for H and W up to
    256 and C up to 2048; everything else, other devices included, runs on PyTorch's own operators
    (:func:`fallback_reason` says why). It is differentiable to any order in every argument; in
    forward mode (``torch.func.jvp``, ``hessian``), and where ``torch.compile`` traces a transform
    of ``torch.func``, on PyTorch's operators.

    Numerics: products in the type of ``x``, accumulated in float32 (float64 for float64); ``x_h``
    and ``x_w`` are rounded to the type of ``x`` once, as in PyTorch. Products of float32 are IEEE
    or TF32 as ``torch.backends.cuda.matmul.fp32_precision`` says, which
    ``torch.set_float32_matmul_precision`` and ``allow_tf32`` set too. Bitwise reproducible from run
    to run (on one stream, as cuBLAS is). Under autocast ``x`` is converted to the
    autocast type; gradients of float32 weights are accumulated and returned in float32.

    Args:
        x: ``[B, C, H, W]``, float16, bfloat16, float32 or float64, any strides; B may be 0.
        weight_h: ``[H, H]``, out, in.
        bias_h: ``[H]`` or None.
        weight_w: ``[W, W]``, out, in.
        bias_w: ``[W]`` or None.
        weight_fuse: ``[C, 3C]`` or ``[C, 3C, 1, 1]``, columns in the order h, w, identity.
        bias_fuse: ``[C]``, or ``[C, H, W]`` for a bias of every pixel, or None.

    Returns:
        ``[B, C, H, W]`` in the memory format and type of ``x``; under autocast in the autocast
        type.

    Raises:
        ValueError: if a shape does not fit or the tensors are on different devices.
        TypeError: if an argument is not a dense floating-point tensor, or types differ outside
            autocast, or float64 and other types are mixed under it.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    require_dense("x", x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected shape [B, C, H, W], none of C, H, W 0, got {list(x.shape)}")
    weights = (weight_h, bias_h, weight_w, bias_w, weight_fuse, bias_fuse)
    size = list(x.shape[1:])
    fuse = [size[0], 3 * size[0]]
    check_weights(NAMES[1:], weights, x, [fuse, [*fuse, 1, 1]], [size[:1], size])
    return dispatch(x, weights)


def check_weights(
    names: Sequence[str], weights: Sequence[Any], x: Tensor, *last: Sequence[list[int]]
) -> None:
    """Raise the errors that :func:`fused_smlp` documents; ``last``: shapes of the last two."""
    height, width = x.shape[2:]
    shapes = ([[height, height]], [[height]], [[width, width]], [[width]], *last)
    for name, weight, allowed in zip(names, weights, shapes, strict=True):
        if weight is None and len(allowed[0]) == 1:
            continue  # no bias
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(weight).__name__}")
        require_dense(name, weight)
        if list(weight.shape) not in allowed:  # a kernel would read beyond one that is too small
            raise ValueError(
                f"{name}: expected shape {' or '.join(map(str, allowed))} for x of shape "
                f"{list(x.shape)}, got {list(weight.shape)}"
            )
        if weight.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {weight.device}")
        if not (weight.is_floating_point() and x.is_floating_point()):
            raise TypeError(
                f"{name}, x: expected floating-point tensors, got {weight.dtype} and {x.dtype}"
            )
        if weight.dtype != x.dtype and autocast_type(x) is None:
            raise TypeError(
                f"{name}: expected the type of x, {x.dtype}, got {weight.dtype}; convert one of "
                "them or run under torch.autocast"
            )


def dispatch(x: Tensor, weights: Sequence[Any], plain: bool = False) -> Tensor:
    """:func:`fused_smlp` without its checks; ``plain`` says that autocast is off, too."""
    if not plain:
        autocast = autocast_type(x)
        if autocast is not None:
            x = under_autocast(x, weights, autocast)
        plain = ops.is_plain((x, *weights))
    unknown_to_kernels = not plain and (
        (torch.compiler.is_compiling() and ops.functorch_is_active())
        or any(map(is_wrapper, weights))
    )
    if unknown_to_kernels or fallback_reason(x):
        return ops.plain_mix(x, *weights)
    return ops.differentiable_mix(x, *weights, plain=plain)


def autocast_type(x: Tensor) -> torch.dtype | None:
    """The type that autocast computes in on the device of ``x``; None where it is off."""
    if not any_autocast():
        return None
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # asking about meta is an error
        return None
    return torch.get_autocast_dtype(device)


# Asked first: the other question needs the name of a device, which takes as long as a launch.
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def under_autocast(x: Tensor, weights: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """``x`` in the autocast type; as in PyTorch, float64 is exempt and mixes with no other type."""
    exempt = [t.dtype == torch.float64 for t in (x, *weights) if t is not None]
    if any(exempt) and not all(exempt):
        raise TypeError(
            "x, weights: float64 is exempt from autocast, which takes all of them or none; "
            f"got x in {x.dtype} and {sum(exempt[1:])} of {len(exempt) - 1} weights in float64"
        )
    return x if exempt[0] else x.to(dtype)


def fallback_reason(x: Tensor) -> str | None:
    """Why an input of this shape, type and device runs on PyTorch; None if the kernels take it.

    Args:
        x: ``[B, C, H, W]``, or a ValueError is raised; its values are not read.
    """
    if x.dim() != 4:
        raise ValueError(f"x: expected shape [B, C, H, W], got {list(x.shape)}")
    _, channels, height, width = x.shape
    if os.environ.get("SMLP_KERNELS_DISABLE") == "1":
        return "SMLP_KERNELS_DISABLE=1 is set"
    if height > MAX_SIZE or width > MAX_SIZE:
        return f"height and width are {height} and {width}; the kernels go to {MAX_SIZE}"
    if channels > MAX_CHANNELS:
        return f"there are {channels} channels; the kernels go to {MAX_CHANNELS}"
    if is_wrapper(x):
        return f"it is a {type(x).__name__}, whose class does not know the kernels"
    if x.dtype not in DTYPES:
        return f"the type is {x.dtype}; the kernels take {', '.join(map(str, DTYPES))}"
    if x.is_cuda:
        arch = arch_of(x)
        if arch < MIN_ARCH:
            return f"the compute capability is {arch / 10}; the kernels need {MIN_ARCH / 10}"
        return None
    if x.device.type == "cpu" and INTERPRETED:
        # the interpreter multiplies bfloat16 as if its bits were integers
        return "Triton's interpreter has no bfloat16" if x.dtype == torch.bfloat16 else None
    return f"the device is {x.device.type}; the kernels need an NVIDIA GPU"


def is_wrapper(tensor: Tensor | None) -> bool:
    """Whether its class holds other tensors and defines PyTorch's operators on them.

    As DTensor does, and the quantized weights of torchao.
    """
    return hasattr(type(tensor), "__tensor_flatten__")

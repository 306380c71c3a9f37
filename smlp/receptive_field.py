"""Which pixels of the input one pixel of the output depends on, by gradient."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from smlp.block import as_integer


def receptive_field(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    position: tuple[int, int] | None = None,
    seed: int = 0,
) -> Tensor:
    """Measure how strongly one output pixel responds to every input pixel.

    The gradient of a random combination of the channels of that output pixel is taken with respect
    to the inputs, its absolute value summed over the input channels and averaged over the batch:
    the effective receptive field of Luo et al. (arXiv 1701.04128). It is exactly 0 where the
    output does not depend on the input; elsewhere channels cancel only by chance.

    Args:
        model: maps ``[B, C, H, W]`` to ``[B, C', H', W']``. A module is in eval mode meanwhile
            (batch statistics would connect everything to everything); a plain function that calls
            one has to set that itself.
        inputs: ``[B, C, H, W]``, floating point: noise, or real images.
        position: (row, column) of the output pixel; the centre by default.
        seed: of the random combination of channels.

    Returns:
        ``[H, W]``, at least 0, of the dtype and device of ``inputs``.

    Raises:
        TypeError: if ``inputs`` is not a floating-point tensor, ``position`` is not a pair of
            integers, or the model returns no tensor.
        ValueError: if inputs or outputs do not have four axes, the batch is empty, the position
            lies outside the output, or nothing in the output depends on the inputs.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        got = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs: expected a floating-point tensor, got {got}")
    if inputs.dim() != 4 or 0 in inputs.shape:
        raise ValueError(f"inputs: expected shape [B, C, H, W], got {list(inputs.shape)}")
    if position is not None and not (
        isinstance(position, Sequence)
        and len(position) == 2
        and None not in map(as_integer, position)
    ):
        raise TypeError(f"position: expected (row, column), got {position!r}")

    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.enable_grad():
            x = inputs.detach().clone().requires_grad_()
            pixel = _output_pixel(model(x), position)
            generator = torch.Generator().manual_seed(seed)
            weights = torch.randn(pixel.shape, generator=generator, dtype=torch.float64)
            (gradient,) = torch.autograd.grad(pixel, x, weights.to(pixel))
    finally:
        for module in training:
            module.training = True
    return gradient.abs().sum(dim=1).mean(dim=0)


def _output_pixel(output: object, position: tuple[int, int] | None) -> Tensor:
    """Select ``[B, C']`` at a position of ``[B, C', H', W']``, or at its centre."""
    if not isinstance(output, Tensor):
        raise TypeError(f"model: expected it to return a tensor, got {type(output).__name__}")
    if output.dim() != 4:
        raise ValueError(
            f"model: expected it to return shape [B, C, H, W], got {list(output.shape)}"
        )
    if not output.requires_grad:
        raise ValueError(
            "model: expected an output that depends on its input, got one without a gradient"
        )
    height, width = output.shape[2:]
    row, column = position if position is not None else (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"position: expected a pixel inside the output's {height} rows and {width} columns, "
            f"got {position}"
        )
    return output[:, :, row, column]

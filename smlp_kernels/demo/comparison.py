"""Fused against reference: the logits of a trained model, one block's gradients, what it sees."""

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smlp import SMLPBlock, SparseMLP, receptive_field
from smlp_kernels.demo.train import logits_of
from smlp_kernels.modules import FusedSMLPBlock
from smlp_kernels.surgery import fuse_model, unfuse_model

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # unit roundoff


@dataclass(frozen=True)
class Difference:
    """One comparison.

    Attributes:
        name: what was compared.
        largest: the largest difference; of logits between the two blocks, else from float64.
        allowed: what rounding explains.
    """

    name: str
    largest: float
    allowed: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains the difference; not where it is NaN."""
        return self.largest <= self.allowed


def ieee_convolutions() -> contextlib.AbstractContextManager[None]:
    """Without TF32, cuDNN's default, by which PyTorch's float32 would be coarser than the kernels'.

    Nothing changes on a CPU.
    """
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def swap_difference(model: SparseMLP, images: Tensor, dtype: torch.dtype) -> Difference:
    """Swap the blocks of a trained model and compare its logits before and after.

    A model with reference blocks gets fused ones and the reverse; the model is swapped back before
    this returns. Rounding explains three times the reference's own distance from float64 (once for
    itself, twice for the fused block, which is held to twice that) and eight roundings of the
    largest logit.

    Args:
        model: with blocks of one kind.
        images: ``[N, C, H, W]``, float32, on the model's device.
        dtype: float32, or what to autocast to.

    Returns:
        The largest difference over images and classes.
    """
    with ieee_convolutions():
        return _swap_difference(model, images, dtype)


def _swap_difference(model: SparseMLP, images: Tensor, dtype: torch.dtype) -> Difference:
    exact_model = copy.deepcopy(model).double()
    was_fused = any(isinstance(module, FusedSMLPBlock) for module in model.modules())
    if was_fused:
        unfuse_model(exact_model)
    exact = logits_of(exact_model, images.double(), torch.float32)

    before = logits_of(model, images, dtype)
    swap, swap_back = (unfuse_model, fuse_model) if was_fused else (fuse_model, unfuse_model)
    swap(model)
    try:
        after = logits_of(model, images, dtype)
    finally:
        swap_back(model)
    reference = after if was_fused else before
    direction = "fused to reference" if was_fused else "reference to fused"
    return Difference(
        f"{direction}, {str(dtype).removeprefix('torch.')}",
        (after - before).abs().max().item(),
        _allowed(reference, exact, dtype, 3),
    )


def block_differences(
    device: torch.device, *, batch: int = 2, height: int = 7, width: int = 6, channels: int = 16
) -> list[Difference]:
    """Compare one fused block, forward and every gradient, with the plain block in float64.

    The fused block may be twice as far from float64 as the plain block in float32, plus eight
    roundings of the largest value.

    Args:
        device: where both blocks run.
        batch: B of the input.
        height: H.
        width: W.
        channels: C.

    Returns:
        One difference for the output and for the gradient of input and of each parameter, all in
        float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = SMLPBlock(height, width, channels)
        x = torch.randn(batch, channels, height, width)
        dy = torch.randn(batch, channels, height, width)
    fused = copy.deepcopy(plain)
    fuse_model(fused)
    exact = copy.deepcopy(plain).double()

    def results(block: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        block.to(device)
        block_x = x.to(device, dtype).requires_grad_()
        y = block(block_x)
        inputs = {"x": block_x, **dict(block.named_parameters())}
        gradients = torch.autograd.grad(y, list(inputs.values()), dy.to(y))
        names = ("output", *(f"gradient of {name}" for name in inputs))
        return {
            name: value.detach().double()
            for name, value in zip(names, (y, *gradients), strict=True)
        }

    with ieee_convolutions():
        expected = results(exact, torch.float64)
        peer = results(plain, torch.float32)
        actual = results(fused, torch.float32)
    return [
        Difference(
            name,
            (value - expected[name]).abs().max().item(),
            _allowed(peer[name], expected[name], torch.float32, 2),
        )
        for name, value in actual.items()
    ]


def block_receptive_fields(model: SparseMLP, device: torch.device) -> dict[str, Tensor]:
    """Measure what the centre of the first stage depends on after its first and second sMLP block.

    The blocks alone, without the convolutions between them; they are linear, so any input shows it.

    Returns:
        ``{"after one block": [H, W], "after two blocks": [H, W]}``.
    """
    first, second = [module for module in model.modules() if isinstance(module, SMLPBlock)][:2]
    noise = torch.randn(
        1, first.channels, first.height, first.width, generator=torch.Generator().manual_seed(0)
    ).to(device)
    return {
        "after one block": receptive_field(first, noise),
        "after two blocks": receptive_field(nn.Sequential(first, second), noise),
    }


def is_cross(field: Tensor) -> bool:
    """Whether exactly the centre's row and column of ``[H, W]`` are reached."""
    expected = torch.zeros_like(field, dtype=torch.bool)
    expected[field.shape[0] // 2] = True
    expected[:, field.shape[1] // 2] = True
    return torch.equal(field > 0, expected)


def _allowed(reference: Tensor, exact: Tensor, dtype: torch.dtype, share: int) -> float:
    error = (reference - exact).abs().max().item()
    return share * error + 8 * EPS[dtype] * exact.abs().max().item()

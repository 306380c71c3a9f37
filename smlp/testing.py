"""Equal to rounding: the block's formula, for float64, and the error that a result may have.

Tests, benchmarks, :func:`smlp_kernels.testing.check_block` and the numerics page all use this one
definition.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("x", "weight_h", "bias_h", "weight_w", "bias_w", "weight_fuse", "bias_fuse")
EPS = {  # unit roundoff of one rounding to the type
    torch.float64: 2.0**-47,  # of 64 roundings: the oracle's own sums round in this type too
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TF32_EPS = 2.0**-11


class Precision(NamedTuple):
    """An arithmetic that a block is computed in."""

    dtype: torch.dtype  # of tensors and parameters
    products: str  # of float32: ieee or tf32, as torch.backends.cuda.matmul.fp32_precision says
    eps: float  # unit roundoff


PRECISIONS = {
    "bf16": Precision(torch.bfloat16, "ieee", EPS[torch.bfloat16]),
    "fp16": Precision(torch.float16, "ieee", EPS[torch.float16]),
    "tf32": Precision(torch.float32, "tf32", TF32_EPS),
    "fp32": Precision(torch.float32, "ieee", EPS[torch.float32]),
    "fp64": Precision(torch.float64, "ieee", EPS[torch.float64]),
}


def formula(
    x: Tensor,
    weight_h: Tensor,
    bias_h: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    weight_fuse: Tensor,
    bias_fuse: Tensor | None,
) -> Tensor:
    """The block as written in the paper (arXiv 2109.05422, section 3.2), by einsum.

    Computed in the type of the arguments, whose shapes are those of :func:`smlp.block.smlp`;
    ``bias_fuse`` may also be ``[C, H, W]``.
    """
    x_h = torch.einsum("hk,bckw->bchw", weight_h, x)
    x_w = torch.einsum("wk,bchk->bchw", weight_w, x)
    if bias_h is not None:
        x_h = x_h + bias_h[:, None]
    if bias_w is not None:
        x_w = x_w + bias_w
    y = torch.einsum("oc,bchw->bohw", weight_fuse.flatten(1), torch.cat([x_h, x_w, x], 1))
    if bias_fuse is None:
        return y
    return y + (bias_fuse[:, None, None] if bias_fuse.dim() == 1 else bias_fuse)


def reduction(name: str, batch: int, height: int, width: int, channels: int) -> int:
    """Number of terms of a float32 sum whose rounding PyTorch's own error need not show.

    For sums over pixels it is all terms, since PyTorch adds them in another order. For the gradient
    of x it is three: PyTorch adds the three branches, a kernel may take one sum over all channels.

    Args:
        name: ``output``, or that of the argument whose gradient the result is; names of a block's
            parameters, such as ``proj_h.weight``, mean the arguments they are.
        batch: B of the input.
        height: H.
        width: W.
        channels: C.
    """
    pixels = batch * height * width
    if name == "output":
        return 1
    if name == "x":
        return 3
    if name in ("weight_h", "bias_h") or name.startswith("proj_h."):
        return pixels // height * channels
    if name in ("weight_w", "bias_w") or name.startswith("proj_w."):
        return pixels // width * channels
    return pixels


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """``|actual - exact| / |exact|`` in the Frobenius norm, in float64; NaN stays NaN."""
    difference = (actual.detach().double() - exact).norm()
    return (difference / exact.norm().clamp_min(1e-300)).item()


@dataclass(frozen=True)
class Comparison:
    """A result next to the exact one and PyTorch's.

    Attributes:
        name: of the result.
        error: the relative error of the result, see :func:`relative_error`.
        peer_error: the relative error of PyTorch; None without a peer.
        problem: why the result is not equal to rounding; None if it is.
    """

    name: str
    error: float
    peer_error: float | None
    problem: str | None


def compare(
    actual: Tensor,
    exact: Tensor,
    peer: Tensor | None,
    *,
    eps: float,
    name: str = "output",
    reduction: int = 1,
    terms: Tensor | None = None,
) -> Comparison:
    """Hold a result to the errors that PyTorch makes at the same precision.

    The largest error may be twice PyTorch's plus eight roundings of the largest value. The root
    mean square of the errors may be 1.25 times PyTorch's plus one rounding of that of the values. A
    rounding is one to the type of the result plus those of a float32 sum of ``reduction`` terms,
    which grow with the square root of that number.

    Args:
        actual: the result under test.
        exact: the formula's, float64, from the same rounded arguments.
        peer: PyTorch's at the same precision; None holds the error to the roundings alone.
        eps: unit roundoff of the precision.
        name: for the message.
        reduction: terms of the sum that the result is, see :func:`reduction`.
        terms: root of the sum of the squared terms of each value. Where it exceeds the value, terms
            cancelled, and the roundings are those of the terms: in a result of few values, all may
            be smaller. The formula, applied to the squares of its arguments, gives that sum.
    """
    if actual.shape != exact.shape:
        problem = f"shape {list(actual.shape)}, expected {list(exact.shape)}"
        return Comparison(name, float("nan"), None, problem)
    exact = exact.detach()
    error = (actual.detach().double() - exact).abs()
    peer_error = torch.zeros_like(error) if peer is None else (peer.detach().double() - exact).abs()
    relative = relative_error(actual, exact)
    peer_relative = None if peer is None else relative_error(peer, exact)
    found: str | None = None
    if not bool(torch.isfinite(error).all()):
        found = f"{int((~torch.isfinite(error)).sum())} values not finite"
    elif error.numel():
        eps += min(eps, EPS[torch.float32]) * (reduction - 1) ** 0.5
        values = exact.abs() if terms is None else torch.maximum(exact.abs(), terms)
        largest = 2 * peer_error.max() + 8 * eps * values.max()
        rms = 1.25 * peer_error.square().mean().sqrt() + eps * values.square().mean().sqrt()
        if not (error.max() <= largest and error.square().mean().sqrt() <= rms):
            found = (
                f"largest error {error.max():.2e} (bound {largest:.2e}), "
                f"rms {error.square().mean().sqrt():.2e} (bound {rms:.2e})"
            )
    return Comparison(name, relative, peer_relative, found)


def assert_close(
    actual: Tensor,
    exact: Tensor,
    peer: Tensor | None,
    *,
    eps: float,
    name: str = "output",
    reduction: int = 1,
    terms: Tensor | None = None,
) -> None:
    """Raise an AssertionError unless :func:`compare`, of the same arguments, finds no problem."""
    found = compare(actual, exact, peer, eps=eps, name=name, reduction=reduction, terms=terms)
    if found.problem is not None:
        raise AssertionError(f"{name}: {found.problem}")


def training_step(
    function: Callable[..., Tensor], arguments: Sequence[Tensor | None], dy: Tensor
) -> dict[str, Tensor]:
    """The output of a function of a block's arguments, and the gradients they want, by name."""
    named = zip(NAMES, arguments, strict=True)
    wanted = {name: a for name, a in named if a is not None and a.requires_grad}
    y = function(*arguments)
    gradients = torch.autograd.grad(y, list(wanted.values()), dy) if wanted else ()
    return {"output": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def compare_block(
    function: Callable[..., Tensor],
    arguments: Sequence[Tensor | None],
    dy: Tensor,
    *,
    eps: float,
    peer: Callable[..., Tensor] = formula,
) -> list[Comparison]:
    """Compare output and gradients of a function with the formula in float64 by :func:`compare`.

    Args:
        function: of a block's arguments, in the order of ``NAMES``.
        arguments: what it is called with; gradients are compared for those that require one.
        dy: the gradient of its output, ``[B, C, H, W]``.
        eps: unit roundoff of the precision.
        peer: the same in PyTorch, at the same precision.
    """
    actual, by_peer = (training_step(f, arguments, dy) for f in (function, peer))
    exact = training_step(formula, to_float64(arguments), dy.double())
    terms = training_step(formula, squared(arguments), dy.double().square())
    batch, channels, height, width = dy.shape
    return [
        compare(
            value,
            exact[name],
            by_peer[name],
            eps=eps,
            name=name if name == "output" else f"gradient of {name}",
            reduction=reduction(name, batch, height, width, channels),
            terms=terms[name].sqrt(),
        )
        for name, value in actual.items()
    ]


@dataclass(frozen=True)
class BlockReport:
    """The report of :func:`smlp_kernels.check_block`; ``str`` gives it as a table.

    Attributes:
        block: size, type and device, in words.
        results: of :func:`compare_block`.
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


def random_arguments(
    batch: int,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    bias: bool = True,
    seed: int = 0,
) -> tuple[Tensor, list[Tensor | None]]:
    """x and the weights of a block in the order of ``NAMES``, rounded to ``dtype``.

    Their means are not zero, so that padding that leaks into results shows; x is contiguous. The
    values depend only on the sizes and the seed.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.25
        return (values * scale).to(dtype).to(device)

    x = random(batch, channels, height, width)
    sizes = (height, width, channels)
    bias_h, bias_w, bias_fuse = [random(size) for size in sizes] if bias else [None] * 3
    return x, [
        random(height, height, scale=height**-0.5),
        bias_h,
        random(width, width, scale=width**-0.5),
        bias_w,
        random(channels, 3 * channels, 1, 1, scale=(3 * channels) ** -0.5),
        bias_fuse,
    ]


def to_float64(arguments: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Exact float64 copies that want gradients where the originals do."""
    return [
        None if a is None else a.detach().double().requires_grad_(a.requires_grad)
        for a in arguments
    ]


def squared(arguments: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Their squares in float64, which want gradients where they do: see ``terms``."""
    return [
        None if a is None else a.detach().double().square().requires_grad_(a.requires_grad)
        for a in arguments
    ]

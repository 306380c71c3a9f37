"""The oracle: the block's formula in float64, and the bounds that kernels are held to."""

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "weight_h", "bias_h", "weight_w", "bias_w", "weight_fuse", "bias_fuse")
EPS = {  # unit roundoff of one rounding to the type
    torch.float64: 2.0**-47,  # of 64 roundings: the oracle's own sums round in this type too
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TF32_EPS = 2.0**-11


def formula(
    x: Tensor,
    weight_h: Tensor,
    bias_h: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    weight_fuse: Tensor,
    bias_fuse: Tensor | None,
) -> Tensor:
    """The block as written in the paper, by einsum, in the type of its arguments."""
    x_h = torch.einsum("hk,bckw->bchw", weight_h, x)
    x_w = torch.einsum("wk,bchk->bchw", weight_w, x)
    if bias_h is not None:
        x_h = x_h + bias_h[:, None]
    if bias_w is not None:
        x_w = x_w + bias_w
    y = torch.einsum("oc,bchw->bohw", weight_fuse.flatten(1), torch.cat([x_h, x_w, x], 1))
    return y if bias_fuse is None else y + bias_fuse[:, None, None]


@dataclass(frozen=True)
class Case:
    """A block's size; random arguments with non-zero mean, so that leaks of padding show."""

    batch: int
    height: int
    width: int
    channels: int
    bias: bool = True

    def arguments(
        self, dtype: torch.dtype, layout: str = "channels_last", seed: int = 0
    ) -> list[Tensor | None]:
        """x and the weights, rounded to ``dtype``; x in ``layout``."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.25
            return (values * scale).to(dtype).to(DEVICE)

        b, h, w, c = self.batch, self.height, self.width, self.channels
        x = in_layout(random(b, c, h, w), layout)
        biases = [random(h), random(w), random(c)] if self.bias else [None] * 3
        return [
            x,
            random(h, h, scale=h**-0.5),
            biases[0],
            random(w, w, scale=w**-0.5),
            biases[1],
            random(c, 3 * c, 1, 1, scale=(3 * c) ** -0.5),
            biases[2],
        ]

    def reduction(self, name: str) -> int:
        """Terms of the sum that the gradient of the argument ``name`` is."""
        pixels = self.batch * self.height * self.width
        own = {"_h": self.height, "_w": self.width}.get(name[-2:])
        if own is not None:
            return pixels // own * self.channels
        return 1 if name == "x" else pixels


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` in other strides; what lies between them in memory is NaN."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "contiguous":
        return x.contiguous()
    b, c, h, w = x.shape
    if layout == "bordered":  # a view into a larger NaN image, channels last
        buffer = x.new_full((b + 1, h + 2, w + 3, c + 1), torch.nan)
        view = buffer[1:, 1:-1, 2:-1, :-1].permute(0, 3, 1, 2)
    elif layout == "strided":  # every second column and channel of a contiguous NaN image
        view = x.new_full((b, 2 * c, h, 2 * w), torch.nan)[:, ::2, :, 1::2]
    elif layout == "transposed":  # H and W swapped in memory
        view = x.new_full((b, c, w, h), torch.nan).transpose(2, 3)
    else:
        raise ValueError(f"layout: unknown {layout!r}")
    return view.copy_(x)


def to_float64(arguments: list[Tensor | None]) -> list[Tensor | None]:
    """Exact float64 copies that want gradients where the originals do."""
    return [
        None if a is None else a.detach().double().requires_grad_(a.requires_grad)
        for a in arguments
    ]


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
    """Hold a result to the errors that PyTorch makes at the same precision.

    The largest error may be twice PyTorch's plus eight roundings of the largest value; the root
    mean square of the errors may be 1.25 times PyTorch's plus one rounding of the values' own. A
    rounding is one to the type of the result plus those of a float32 sum of ``reduction`` terms,
    which grow with its square root.

    Args:
        actual: the result under test.
        exact: the oracle's, float64.
        peer: PyTorch's at the same precision; None holds the error to the roundings alone.
        eps: unit roundoff of the precision.
        name: for the message.
        reduction: terms of the sum that the result is.
        terms: root of the sum of the squared terms of each value. Where it exceeds the value, terms
            cancelled, and the roundings are those of the terms: in a result of few values, none
            may be left that is as large. The formula at the squares of its arguments is that sum.
    """
    eps += min(eps, EPS[torch.float32]) * (reduction - 1) ** 0.5
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}")
    error = (actual.double() - exact).abs()
    if not bool(torch.isfinite(error).all()):
        raise AssertionError(f"{name}: {int((~torch.isfinite(error)).sum())} values not finite")
    peer_error = torch.zeros_like(error) if peer is None else (peer.double() - exact).abs()
    if error.numel() == 0:
        return
    values = exact.abs() if terms is None else torch.maximum(exact.abs(), terms)
    largest = 2 * peer_error.max() + 8 * eps * values.max()
    rms = 1.25 * peer_error.square().mean().sqrt() + eps * values.square().mean().sqrt()
    if error.max() > largest or error.square().mean().sqrt() > rms:
        raise AssertionError(
            f"{name}: largest error {error.max():.2e} (bound {largest:.2e}), "
            f"rms {error.square().mean().sqrt():.2e} (bound {rms:.2e})"
        )

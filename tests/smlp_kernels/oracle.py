"""Random arguments of a block in many layouts; the oracle and its bounds are smlp.testing's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smlp.testing import random_arguments, reduction

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
        sizes = (self.batch, self.height, self.width, self.channels)
        x, weights = random_arguments(*sizes, dtype, device=DEVICE, bias=self.bias, seed=seed)
        return [in_layout(x, layout), *weights]

    def reduction(self, name: str) -> int:
        """Terms of the sum that the gradient of the argument ``name`` is."""
        return reduction(name, self.batch, self.height, self.width, self.channels)


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

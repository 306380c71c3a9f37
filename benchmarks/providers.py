"""The implementations that are compared, all on one set of parameters.

===================== ============================================================================
eager_nchw            the reference block, x NCHW-contiguous
eager_nhwc            the reference block, x channels_last
compiled              ``torch.compile(mode="max-autotune-no-cudagraphs")`` of the reference
handwritten           :mod:`benchmarks.handwritten`, the best order in plain torch
handwritten_compiled  the same under torch.compile
fused                 ``smlp_kernels.FusedSMLPBlock``
===================== ============================================================================

CUDA graphs are left out of torch.compile because the timing replays every provider from one.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.handwritten import channels_first
from benchmarks.shapes import expect
from smlp import SMLPBlock

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        name: the name in options and reports.
        build: makes the callable ``x [B, C, H, W] -> y`` from a block, sharing its parameters.
        layout: the only layout it is measured with; None takes x in the layout of the case.
        gpu_only: whether it is left out without a GPU.
        compiled: whether building it takes seconds of compilation per shape.
    """

    name: str
    build: Callable[[SMLPBlock], Call]
    layout: str | None = None
    gpu_only: bool = False
    compiled: bool = False

    def why_not(self, layout: str) -> str | None:
        """The reason why this provider cannot be measured with x in ``layout`` here, or None."""
        if self.gpu_only and not torch.cuda.is_available():
            return f"{self.name} needs an NVIDIA GPU"
        if layout == "nchw" and self.layout == "channels_last":
            return f"{self.name} would first have to convert x from nchw"
        if self.name == "fused" and os.environ.get("TRITON_INTERPRET") == "1":
            return "fused would run in Triton's interpreter: TRITON_INTERPRET=1 is set"
        return None


def _compile(call: Call) -> Call:
    import torch._functorch.config as functorch_config

    # A backward that is timed alone runs many times on one forward, so its buffers must stay.
    functorch_config.donated_buffer = False
    return torch.compile(call, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)


def _handwritten(block: SMLPBlock) -> Call:
    return partial(channels_first, block)


def _fused(block: SMLPBlock) -> Call:
    from smlp_kernels import fuse_model

    fused = copy.copy(block)  # of the same modules
    fuse_model(fused)
    return fused


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("eager_nchw", lambda block: block, layout="nchw"),
        Provider("eager_nhwc", lambda block: block, layout="channels_last"),
        Provider("compiled", _compile, gpu_only=True, compiled=True),
        Provider("handwritten", _handwritten),
        Provider(
            "handwritten_compiled",
            lambda block: _compile(_handwritten(block)),
            gpu_only=True,
            compiled=True,
        ),
        Provider("fused", _fused, gpu_only=True),
    )
}


def select(names: list[str]) -> list[Provider]:
    """Providers by name; ``all`` is every one. A ValueError lists what there is."""
    names = list(PROVIDERS) if names == ["all"] else names
    for name in names:
        expect("providers", name, PROVIDERS)
    return [PROVIDERS[name] for name in names]

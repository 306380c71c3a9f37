"""The implementations that are compared, all on one set of parameters, each checked before timing.

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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.handwritten import channels_first
from benchmarks.shapes import expect
from smlp import SMLPBlock
from smlp.testing import PRECISIONS, compare, formula, reduction, relative_error

Call = Callable[[Tensor], Tensor]

# Relative Frobenius error against fp64 beyond which the arithmetic is coarser than was asked for,
# PyTorch's own too, which the others are compared with.
ERROR_BOUNDS = {"bf16": 1e-2, "fp16": 2e-3, "tf32": 2e-3, "fp32": 1e-5}


class WrongResultError(RuntimeError):
    """A provider computes something else than the oracle, so its time means nothing."""


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        name: what it is selected and reported by.
        build: makes the callable ``x [B, C, H, W] -> y`` from a block, sharing its parameters.
        layout: the only layout it is measured with; None takes x in the layout of the case.
        gpu_only: whether it is left out where there is no GPU.
        compiled: whether building it takes seconds of compilation per shape.
    """

    name: str
    build: Callable[[SMLPBlock], Call]
    layout: str | None = None
    gpu_only: bool = False
    compiled: bool = False

    def suits(self, layout: str) -> bool:
        """Whether x in ``layout`` can be taken as it is."""
        return not (layout == "nchw" and self.layout == "channels_last")

    def why_not(self, layout: str) -> str | None:
        """The reason why this provider cannot be measured with x in ``layout`` here, or None."""
        if self.gpu_only and not torch.cuda.is_available():
            return f"{self.name} needs an NVIDIA GPU"
        if not self.suits(layout):
            return f"{self.name} would first have to convert x from nchw"
        if self.name == "fused":
            try:
                from smlp_kernels.launch import INTERPRETED
            except ImportError as error:
                return f"fused cannot be imported: {error}"
            if INTERPRETED:
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


def gradient_targets(block: SMLPBlock, x: Tensor) -> dict[str, Tensor]:
    """x and every parameter, by name: all that a training step differentiates."""
    return {"x": x, **dict(block.named_parameters())}


def results_of(
    call: Call, targets: dict[str, Tensor], dy: Tensor, *, backward: bool = True
) -> dict[str, Tensor]:
    """Run a pass: ``output`` and, if ``backward``, ``d x`` and the other gradients.

    Args:
        call: what a provider built.
        targets: from :func:`gradient_targets`, x among them.
        dy: the gradient of y.
        backward: run a training pass instead of inference, whether the caller records gradients or
            not. A compiled provider has a graph for each, so neither is run unless asked for.
    """
    with torch.set_grad_enabled(backward):
        output = call(targets["x"])
    gradients = torch.autograd.grad(output, list(targets.values()), dy) if backward else ()
    names = ("output", *(f"d {name}" for name in targets))
    return dict(zip(names, (output.detach(), *gradients), strict=False))


class Oracle(NamedTuple):
    """:func:`results_of` the formula in fp64 (``exact``) and in the type of x (``peer``)."""

    exact: dict[str, Tensor]
    peer: dict[str, Tensor]


def run_oracle(block: SMLPBlock, x: Tensor, dy: Tensor) -> Oracle:
    """The formula from the same, already rounded x, parameters and dy."""

    def by_formula(block: SMLPBlock, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        targets = gradient_targets(block, x.detach().requires_grad_())
        return results_of(lambda x: formula(x, *block.weights()), targets, dy)

    exact = by_formula(copy.deepcopy(block).double(), x.double(), dy.double())
    return Oracle(exact, by_formula(block, x, dy))


def check(
    provider: Provider, results: dict[str, Tensor], oracle: Oracle, dtype: str
) -> dict[str, float]:
    """Relative errors of :func:`results_of` a provider; raises unless all are equal to rounding.

    Raises:
        WrongResultError: naming the provider, the tensor and its error.
    """
    errors, bound, eps = {}, ERROR_BOUNDS[dtype], PRECISIONS[dtype].eps
    batch, channels, height, width = oracle.exact["output"].shape
    where = f"for x {[batch, channels, height, width]}"
    for name, value in results.items():
        exact, peer = oracle.exact[name], oracle.peer[name]
        error = errors[name] = relative_error(value, exact)
        if not error <= bound:  # written so that NaN fails
            raise WrongResultError(
                f"{provider.name}: {name} is off by {error:.1e} (relative Frobenius norm, "
                f"{dtype} allows {bound:.0e}) {where}"
            )
        terms = reduction(name.removeprefix("d "), batch, height, width, channels)
        if problem := compare(value, exact, peer, eps=eps, reduction=terms).problem:
            raise WrongResultError(f"{provider.name}: {name} is not {dtype}, {problem}, {where}")
    return errors

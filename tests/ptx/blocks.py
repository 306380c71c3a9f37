"""Training steps of a block on the executor, next to float64 and PyTorch at the same precision."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from smlp.block import smlp
from smlp.testing import NAMES, PRECISIONS, Comparison, compare, formula, squared, to_float64
from tests.ptx.chip import Chip
from tests.ptx.kernels import blocks_on
from tests.ptx.memory import to_tf32
from tests.smlp_kernels.oracle import Case, in_layout

# What is seen and is no fault of the kernels.
NOTICES = [
    # LLVM moves copies of registers behind the fence; ptxas, which gives out the registers, puts
    # that right.
    "register changed without wgmma.fence",
]
if tuple(map(int, triton.__version__.split(".")[:3])) < (3, 7, 1):
    # in every product of Triton (triton-lang/triton#9610, #10537)
    NOTICES.append("wgmma reads an asynchronous copy without fence.proxy.async")
SHORT = {"channels_last": "NHWC", "contiguous": "NCHW"}
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    problems: list[str]  # violations and wrong values
    errors: dict[str, tuple[float, float]]  # relative Frobenius, of the block and of PyTorch
    launches: int

    @property
    def worst(self) -> float:
        """The largest error, in errors of PyTorch where it has any."""
        return max((fused / plain for fused, plain in self.errors.values() if plain), default=0.0)


@dataclass(frozen=True)
class Block:
    """A block, its input, a chip, and which gradients of it are taken.

    Attributes:
        arch: ten times the compute capability.
        precision: of ``PRECISIONS``.
        size: B, C, H, W.
        layout: of x, see :func:`placed`.
        gradient_layout: of the incoming gradient; None: as x.
        wanted: arguments whose gradients are taken.
        absent: biases that are None.
        bias_map: the bias of the fuse is [C, H, W].
        autocast: tensors are float32, and computed in the type of ``precision`` under autocast.
        order: 2: also the derivatives of a function of all gradients.
        early_copies: as in :func:`tests.ptx.launch.launch`.
        multiprocessors: of the chip, on which the kernel in CUDA C++ has to run; 0: Triton's.
        transposed_weights: matrices lie transposed in memory.
        nan: x and the incoming gradient have one NaN, in the last image.
    """

    arch: int
    precision: str
    size: tuple[int, int, int, int]
    layout: str = "channels_last"
    gradient_layout: str | None = None
    wanted: tuple[str, ...] = NAMES
    absent: tuple[str, ...] = ()
    bias_map: bool = False
    autocast: bool = False
    order: int = 1
    early_copies: bool = False
    multiprocessors: int = 0
    transposed_weights: bool = False
    nan: bool = False

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        words = [f"sm_{self.arch}", self.precision, SHORT.get(self.layout, self.layout), size]
        if self.gradient_layout:
            words.append(f"dy {SHORT.get(self.gradient_layout, self.gradient_layout)}")
        if self.wanted != NAMES:
            words.append("d " + ",".join(self.wanted) if self.wanted else "no gradient")
        words += [f"no {name}" for name in self.absent]
        flags = ("bias_map", "autocast", "early_copies", "transposed_weights", "nan")
        words += [name for name in flags if getattr(self, name)]
        if self.order > 1:
            words.append("second order")
        if self.multiprocessors:
            words.append(f"{self.multiprocessors} multiprocessors")
        return " ".join(words)

    def run(self, seed: int = 1, change: Callable[[str, str], str] | None = None) -> Outcome:
        """Execute the step; ``change`` breaks its kernels on purpose."""
        chip = Chip(self.arch, seed=seed, early_copies=self.early_copies, change=change)
        dtype, products, eps = PRECISIONS[self.precision]
        arguments, dy = self.arguments(seed)
        autocast = torch.autocast("cpu", dtype, enabled=self.autocast)
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = products
        try:
            with blocks_on(chip, self.multiprocessors), autocast:
                from smlp_kernels import fused_smlp

                actual = self.results(fused_smlp, arguments, dy)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        exact = self.results(formula, to_float64(arguments), dy.double())
        with autocast:
            peer = self.results(tf32_formula if products == "tf32" else plain, arguments, dy)
        squares = {}  # every result is a sum of products of the arguments
        if self.order == 1:
            squares = self.results(formula, squared(arguments), dy.double().square())
        problems = chip.violations() if self.multiprocessors else faults(chip)
        problems += self.not_in_cuda([record.kernel for record in chip.records])
        results: dict[str, Comparison] = {}
        for name, value in actual.items():
            if count := chip.memory.unwritten(value):
                problems.append(f"{name}: {count} elements were never written")
            terms = squares[name].sqrt() if name in squares else None
            if self.nan and (problem := misplaced_nan(value, exact[name])):
                problems.append(f"wrong value: {name}: {problem}")
            value, wanted, plain_value, terms = (
                None if t is None else t.masked_fill(exact[name].isnan(), 0)
                for t in (value, exact[name], peer[name], terms)
            )
            results[name] = compare(
                value, wanted, plain_value,
                eps=eps, name=name, reduction=self.terms(name), terms=terms,
            )  # fmt: skip
            if problem := results[name].problem:
                problems.append(f"wrong value: {name}: {problem}")
        if not chip.records and self.size[0]:
            problems.append("no kernel was launched")
        errors = {name: (r.error, r.peer_error or 0.0) for name, r in results.items()}
        return Outcome(problems, errors, len(chip.records))

    def not_in_cuda(self, kernels: list[str]) -> list[str]:
        """Whether others ran where the kernel in CUDA C++ should have."""
        expected = (2 if self.wanted == ("x",) else 1) if self.multiprocessors else 0
        if sum(kernel.startswith("smlp_") for kernel in kernels) == expected:
            return []
        return [f"expected {expected} launches of the kernel in CUDA C++, got {kernels}"]

    def terms(self, name: str) -> int:
        """Terms of the longest float32 sum that a result is, one product added at a time."""
        batch, channels, height, width = self.size
        own = Case(batch, height, width, channels).reduction(name.removeprefix("second "))
        return max(3 * channels, own)

    def arguments(self, seed: int) -> tuple[list[Tensor | None], Tensor]:
        """x and the weights, those wanted as leaves, and the incoming gradient."""
        batch, channels, height, width = self.size
        case = Case(batch, height, width, channels)
        dtype = torch.float32 if self.autocast else PRECISIONS[self.precision][0]
        given = dict(zip(NAMES, case.arguments(dtype, "contiguous", seed), strict=True))
        if self.bias_map:
            given["bias_fuse"] = torch.randn_like(given["x"][0]) if batch else None
        given["x"] = placed(given["x"], self.layout)
        for name in self.absent:
            given[name] = None
        if self.transposed_weights:
            for name in ("weight_h", "weight_w", "weight_fuse"):
                matrix = given[name].flatten(1).t().contiguous().t()
                given[name] = matrix.view(given[name].shape)
        for name in self.wanted:
            if given[name] is not None:
                given[name].requires_grad_()
        dy = case.arguments(dtype, "contiguous", seed + 1)[0]
        if self.nan:
            for tensor in (given["x"], dy):
                tensor.detach()[-1, channels // 2, height // 2, width - 1] = torch.nan
        if self.autocast:
            dy = dy.to(PRECISIONS[self.precision][0])
        return list(given.values()), placed(dy, self.gradient_layout or self.layout)

    def results(
        self, function: Callable[..., Tensor], arguments: list[Tensor | None], dy: Tensor
    ) -> Results:
        """The output and the gradients, by the names of the arguments."""
        y = function(*arguments)
        leaves = {
            name: argument
            for name, argument in zip(NAMES, arguments, strict=True)
            if argument is not None and argument.requires_grad
        }
        if not leaves:
            return {"output": y}
        inputs = list(leaves.values())
        gradients = torch.autograd.grad(y, inputs, dy, create_graph=self.order > 1)
        found = {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}
        if self.order > 1:
            total = sum(gradient.square().sum() for gradient in gradients)
            second = torch.autograd.grad(total, inputs, materialize_grads=True)
            found |= {f"second {name}": g for name, g in zip(leaves, second, strict=True)}
        return {name: value.detach() for name, value in found.items()}


def faults(chip: Chip) -> list[str]:
    """The violations that are held against the kernels."""
    return [text for text in chip.violations() if not any(n in text for n in NOTICES)]


def misplaced_nan(value: Tensor, exact: Tensor) -> str | None:
    """Why NaN is not where it has to be, which is where it is in float64."""
    wrong = value.isnan() != exact.isnan()
    if not wrong.any():
        return None
    places = wrong.nonzero()
    return f"NaN or none in {len(places)} wrong places, first {places[0].tolist()}"


@contextlib.contextmanager
def checked(arch: int) -> Iterator[None]:
    """Fused blocks inside run on a chip of this compute capability; a violation is an error."""
    chip = Chip(arch)
    with blocks_on(chip):
        yield
    if problems := faults(chip):
        raise RuntimeError("\n".join(problems))


def placed(x: Tensor, layout: str) -> Tensor:
    """The oracle's layouts, and those whose addresses are unusual.

    ``shifted`` starts one element after an aligned address; the columns of ``far`` are so far apart
    that offsets inside an image need 64 bits (memory between them is never touched).
    """
    if layout == "shifted":
        memory = x.new_full((x.numel() + 1,), torch.nan)[1:]
        return memory.view(x.shape).copy_(x)
    if layout == "far":
        channels, height, width = x.shape[1:]
        stride = 2**31 // (channels - 1) + 64
        memory = x.new_empty((channels - 1) * stride + height * width)
        return memory.as_strided(x.shape, (0, stride, width, 1)).copy_(x)
    return in_layout(x, layout)


def plain(x: Tensor, *weights: Tensor | None) -> Tensor:
    """``smlp.block.smlp``, with a bias map as well."""
    bias = weights[5]
    if bias is None or bias.dim() == 1:
        return smlp(x, *weights)
    y = smlp(x, *weights[:5], None)
    return y + bias.to(y.dtype)


class _ToTf32(torch.autograd.Function):
    """Cuts off what a product in TF32 does not read, of values and of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return to_tf32(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _ToTf32.apply(gradient)


class _GradientToTf32(torch.autograd.Function):
    """The same of gradients alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _ToTf32.apply(gradient)


def tf32_formula(x: Tensor, *weights: Tensor | None) -> Tensor:
    """The formula with all products in TF32, float32 sums."""
    cut = _ToTf32.apply
    weight_h, bias_h, weight_w, bias_w, fuse, bias = weights
    x = cut(x)
    x_h = torch.einsum("hk,bckw->bchw", cut(weight_h), x)
    x_w = torch.einsum("wk,bchk->bchw", cut(weight_w), x)
    x_h = x_h if bias_h is None else x_h + bias_h[:, None]
    x_w = x_w if bias_w is None else x_w + bias_w
    branches = torch.cat([cut(x_h), cut(x_w), x], 1)
    y = _GradientToTf32.apply(torch.einsum("oc,bchw->bohw", cut(fuse.flatten(1)), branches))
    return y if bias is None else y + bias.reshape(bias.shape[0], *bias.shape[1:] or (1, 1))

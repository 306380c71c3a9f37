"""``warmup``: the kernels that a model launches, compiled before its first step, on all cores."""

import contextlib
import contextvars
import copy
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smlp_kernels import launch, ops
from smlp_kernels.folding import FoldedSMLPBlock
from smlp_kernels.functional import fallback_reason
from smlp_kernels.kernels.backward import mix_backward
from smlp_kernels.kernels.mix import mix
from smlp_kernels.launch import Call
from smlp_kernels.modules import FusedSMLPBlock
from smlp_kernels.weights import Weights

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())


class WarmupReport(NamedTuple):
    """What :func:`warmup` did."""

    kernels: int  # different ones that the blocks need
    seconds: float  # few where Triton's cache on disk had them


class Operation(NamedTuple):
    """An operator of :mod:`smlp_kernels.ops` and the arguments it was given."""

    operator: Any
    arguments: tuple[Any, ...]


def warmup(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    training: bool = True,
) -> WarmupReport:
    """Compile the kernels of the fused blocks inside ``model`` before its first step.

    The model is run on tensors without memory to see what its blocks are given; then all kernels
    are compiled at once, on as many threads as there are cores, their launchers built and both
    loaded. Parameters, gradients, statistics and random numbers stay as they are, and nothing runs
    on the GPU. Call it as the training would call the model: on its device, in its memory format
    and inside its ``torch.autocast``, but before ``torch.compile`` or data parallelism wrap it.
    Another batch size needs no other kernels.

    Args:
        model: takes one tensor; has at least one fused block inside.
        input_shape: of that tensor, ``[B, C, H, W]``.
        dtype: of that tensor; by default that of the first floating-point parameter.
        memory_format: of that tensor.
        training: whether the kernels of the backward pass are compiled, too.

    Returns:
        The number of kernels and the seconds it took.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if ``model`` has no fused block, or none that runs on the kernels, as on a CPU;
            if ``input_shape`` is not four positive integers or the model does not take it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not fused_blocks(model):
        raise ValueError(
            f"model: expected at least one fused block, found none in {type(model).__name__}; "
            "smlp_kernels.fuse_model swaps them in"
        )
    sizes = tuple(input_shape)
    if len(sizes) != 4 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"input_shape: expected four positive integers, got {input_shape!r}")
    start = time.perf_counter()
    operations, reasons = record(model, sizes, dtype, memory_format, training)
    if not operations:
        raise ValueError(
            f"model: expected a fused block that runs on the kernels, found none in "
            f"{type(model).__name__}: {'; '.join(reasons) or 'none of them is run'}"
        )
    report = WarmupReport(compile_all(operations), time.perf_counter() - start)
    logger.info("%d kernels compiled in %.1f s", *report)
    return report


def fused_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks inside ``model`` that may run on the kernels."""
    return [m for m in model.modules() if isinstance(m, FusedSMLPBlock | FoldedSMLPBlock)]


def record(
    model: nn.Module,
    input_shape: tuple[int, ...],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
    training: bool,
) -> tuple[list[Operation], list[str]]:
    """The operators that a step calls, and why blocks call none; nothing is computed."""
    fake = FakeTensorMode()
    # A copy without values keeps the strides, which the kernels are compiled for. Not by
    # functional_call, which leaves such values in modules that are used in two places.
    with FakeCopyMode(fake):
        model = copy.deepcopy(model)
    state = [*model.parameters(), *model.buffers()]
    first = next(value for value in state if value.is_floating_point())
    reasons: dict[str | None, None] = {}
    for block in fused_blocks(model):
        block.register_forward_pre_hook(
            lambda _, arguments: reasons.setdefault(fallback_reason(arguments[0]))
        )
    recorder = Recorder()
    # one thread: modes are a thread's own
    with fake, recorder, torch.autograd.set_multithreading_enabled(False):
        x = torch.empty(input_shape, device=first.device, dtype=dtype or first.dtype)
        x = x.contiguous(memory_format=memory_format)
        try:
            with torch.set_grad_enabled(training):
                outputs = model(x)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"input_shape: expected one that {type(model).__name__} takes, got "
                f"{list(input_shape)}: {error}"
            ) from error
        wanted = [value for value in state if value.requires_grad]
        outputs = [y for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.requires_grad]
        if training and wanted and outputs:
            dy = [torch.empty_like(y) for y in outputs]
            torch.autograd.grad(outputs, wanted, dy, allow_unused=True)
    return recorder.operations, [reason for reason in reasons if reason is not None]


class Recorder(TorchDispatchMode):
    """Keeps the arguments of the two operators on their way to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (ops.mix, ops.mix_backward):
            self.operations.append(Operation(func, (*args, *kwargs.values())))
        return func(*args, **kwargs)


def compile_all(operations: list[Operation]) -> int:
    """Compile what the operators launch; the number of different kernels."""
    wanted: dict[str, tuple[Call, Tensor]] = {}
    for operation in operations:
        load_hopper(operation)
        for call in calls_of(operation):
            key = repr((call.plan.kernel, call.plan.options, launch.specialisation(call)))
            wanted[key] = call, operation.arguments[0]
    with ThreadPoolExecutor() as pool:
        # in a context that ends here: Triton leaves its mode on where a compilation fails
        kernels = contextvars.copy_context().run(compiled, pool, list(wanted.values()))
        devices = [x for _, x in wanted.values()]
        list(pool.map(load, kernels, devices))  # a list raises what a thread raised
    return len(wanted)


def compiled(pool: ThreadPoolExecutor, calls: list[tuple[Call, Tensor]]) -> list[Any]:
    """Triton's compiled kernels of some calls, compiled on the threads of a pool."""
    with triton.AsyncCompileMode(pool):
        kernels = [call.compile(x) for call, x in calls]
    return [kernel.result() if hasattr(kernel, "result") else kernel for kernel in kernels]


def load(kernel: Any, device_of: Tensor) -> None:
    """Build a kernel's launcher, which takes seconds of a C compiler in Triton 3.6, and load it."""
    if launch.INTERPRETED:
        return
    with launch.on_device_of(device_of):
        _ = kernel.run


def load_hopper(operation: Operation) -> None:
    """Load the Hopper kernel that an operator would take; if that fails, its call says so."""
    if ops.run_hopper is None or operation.operator is not ops.mix:
        return
    from smlp_kernels import hopper

    x, *weights = (shape_of(a) if isinstance(a, Tensor) else a for a in operation.arguments)
    with contextlib.suppress(hopper.UnavailableError):
        hopper.prepare(x, Weights(*weights), operation.arguments[0].device.index)


def calls_of(operation: Operation) -> list[Call]:
    """What an operator launches for arguments such as it was given, on tensors without memory."""
    operator, (first, *_) = operation
    arch = launch.arch_of(first)
    arguments: Any = [shape_of(a) if isinstance(a, Tensor) else a for a in operation.arguments]
    calls: list[Call] = []
    if operator is ops.mix_backward:
        dy, x, *others = arguments
        mix_backward(dy, x, *ops.split_arguments(others), arch, calls.append)
        return calls
    x, *weights = arguments
    mix(x, Weights(*weights), arch, calls.append)
    return calls


def shape_of(tensor: Tensor) -> Tensor:
    """Shape, strides and type of a tensor, without memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

"""``warmup``: compile the kernels that a model launches before its first step, on all cores."""

import copy
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smlp.network import require_module
from smlp_kernels import hopper, launch, ops
from smlp_kernels.functional import fallback_reason
from smlp_kernels.kernels.backward import mix_backward
from smlp_kernels.kernels.mix import mix
from smlp_kernels.launch import Call
from smlp_kernels.weights import Weights

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())


class WarmupReport(NamedTuple):
    """The report of :func:`warmup`."""

    kernels: int  # different ones that the blocks need
    seconds: float  # few if Triton's cache on disk had them


def warmup(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    training: bool = True,
) -> WarmupReport:
    """Compile the kernels of the fused blocks inside ``model`` before its first step.

    The model runs on tensors without memory to see what its blocks are given. Then all kernels are
    compiled in parallel, on as many threads as there are cores, and loaded with their launchers.
    Parameters, gradients, statistics and random numbers do not change, and nothing runs on the GPU.
    Call this as training would call the model: on its device, in its memory format and inside its
    ``torch.autocast``, but before ``torch.compile`` or data parallelism wrap it. Other batch sizes
    need no other kernels.

    Args:
        model: takes one tensor; has at least one fused block inside.
        input_shape: the shape of that tensor, ``[B, C, H, W]``.
        dtype: its type; by default that of the first floating-point parameter.
        memory_format: its memory format.
        training: whether to compile the kernels of the backward pass as well.

    Returns:
        The number of kernels and the seconds it took.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if ``model`` has no fused block, or none that runs on the kernels, as on a CPU;
            if ``input_shape`` is not four positive integers or the model does not take it.
    """
    require_module(model)
    if not any(map(may_run_on_kernels, model.modules())):
        raise ValueError(
            f"model: expected at least one fused block, found none in {type(model).__name__}; "
            "smlp_kernels.fuse_model swaps them in"
        )
    sizes = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    if len(sizes) != 4 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"input_shape: expected four positive integers, got {input_shape!r}")
    start = time.perf_counter()
    calls, reasons = record(model, sizes, dtype, memory_format, training)
    if not calls:
        raise ValueError(
            f"model: expected a fused block that runs on the kernels, found none in "
            f"{type(model).__name__}: {'; '.join(reasons) or 'none is run by its weights alone'}"
        )
    compile_all(calls)
    report = WarmupReport(len(calls), time.perf_counter() - start)
    logger.info("%d kernels compiled in %.1f s", *report)
    return report


def may_run_on_kernels(module: nn.Module) -> bool:
    """Whether it is a fused or folded block: these name a class that runs on PyTorch instead."""
    return hasattr(module, "plain_class")


def record(
    model: nn.Module,
    input_shape: tuple[int, ...],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
    training: bool,
) -> tuple[list[tuple[Call, Tensor]], list[str]]:
    """Return the different kernels that a step launches, and why blocks launch none.

    Each comes with a tensor of its device. Nothing is computed.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # constants from outside the model
    # A copy without values keeps the strides, which the kernels are compiled for. Not by
    # functional_call, which leaves such values in modules that are used in two places.
    with FakeCopyMode(fake):
        model = copy.deepcopy(model)
    state = [*model.parameters(), *model.buffers()]
    first = next(value for value in state if value.is_floating_point())
    reasons: dict[str | None, None] = {}
    for block in filter(may_run_on_kernels, model.modules()):
        block.register_forward_pre_hook(
            lambda _, args, named: reasons.setdefault(fallback_reason(*args, **named)),
            with_kwargs=True,
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
    return list(recorder.calls.values()), [reason for reason in reasons if reason is not None]


class Recorder(TorchDispatchMode):
    """Records what the two operators would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Call, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (ops.mix, ops.mix_backward):
            arch, keep = launch.arch_of(args[0]), partial(self.keep, args[0])
            with unset_fake_temporarily():  # Triton wants addresses; those of meta tensors are 0
                first, second, *_ = meta = tuple(map(on_meta, args))
                if func is ops.mix_backward:
                    mix_backward(first, second, *ops.split_arguments(meta[2:]), arch, keep)
                else:
                    mix(first, Weights(*meta[1:]), arch, keep)
                    if arch == hopper.ARCH and ops.run_hopper is not None:
                        hopper.path_of(first, Weights(*meta[1:]), args[0])  # loads it
        return func(*args, **(kwargs or {}))

    def keep(self, x: Tensor, call: Call) -> None:
        """Keep a call, on the device of ``x``, for which another kernel is compiled."""
        plan = call.plan
        types = [None if tensor is None else tensor.dtype for tensor in call.tensors]
        self.calls.setdefault(repr((plan.kernel, plan.options, plan.constants, types)), (call, x))


def compile_all(calls: list[tuple[Call, Tensor]]) -> None:
    """Compile and load kernels, each for the device of a tensor, on all cores."""

    def compiled(call: Call, x: Tensor) -> None:
        with launch.on_device_of(x):
            kernel = call.by_triton(launch=False)
            if kernel is not None:  # as in the interpreter
                _ = kernel.run  # builds the launcher: seconds of a C compiler in Triton 3.6

    with ThreadPoolExecutor() as pool:
        wait([pool.submit(compiled, *one) for one in calls])
    # Those are in Triton's cache now. Others failed, perhaps only because Python 3.11 and 3.12 may
    # raise "AST constructor recursion depth mismatch" when two threads parse at once.
    for one in calls:
        compiled(*one)


def on_meta(value: Any) -> Any:
    """A tensor of the same shape, strides and type without memory; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

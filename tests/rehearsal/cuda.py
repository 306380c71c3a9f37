"""torch.cuda without a GPU: an H100 whose tensors live in the memory of the CPU."""

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.rehearsal.graphs import CUDAGraph, capture, is_capturing

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)
FREE_BYTES = 20 << 30  # some tests want more, and are to be skipped


class Stream:
    """A stream; everything on it is done as soon as it is asked for."""

    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("cuda", 0)

    def wait_stream(self, stream: "Stream") -> None:
        if not isinstance(stream, Stream):
            raise TypeError(f"stream: expected a Stream, got {stream!r}")

    def synchronize(self) -> None:
        synchronize()


DEFAULT_STREAM = Stream()
_streams = [DEFAULT_STREAM]


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    _streams.append(stream or _streams[-1])
    try:
        yield
    finally:
        _streams.pop()


class Event:
    """A moment of the CPU's clock."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self._timing, self._seconds = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        synchronize()

    def elapsed_time(self, end: "Event") -> float:
        if not (self._timing and end._timing and self._seconds and end._seconds):
            raise RuntimeError("Both events must be created with enable_timing and recorded")
        return max(1e-3, 1e3 * (end._seconds - self._seconds))


class graph:  # torch's name
    """``torch.cuda.graph``: capture what is called inside."""

    def __init__(
        self,
        cuda_graph: CUDAGraph,
        pool: Any = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        if stream is DEFAULT_STREAM:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported: capture on the default stream")
        self._capture = capture(cuda_graph)

    def __enter__(self) -> None:
        self._capture.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._capture.__exit__(*error)


def synchronize(device: Any = None) -> None:
    if is_capturing():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_initialized": lambda: False,  # there is no state of random numbers to save
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "device": lambda device: contextlib.nullcontext(),
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "synchronize": synchronize,
    "current_stream": lambda device=None: _streams[-1],
    "stream": stream,
    "is_current_stream_capturing": is_capturing,
    "memory_allocated": lambda device=None: 1000,
    "max_memory_allocated": lambda device=None: 2000,
    "reset_peak_memory_stats": lambda device=None: None,
    "mem_get_info": lambda device=None: (FREE_BYTES, PROPERTIES.total_memory),
    "empty_cache": synchronize,
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda new_state, device="cuda": None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "_sleep": lambda cycles: None,
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
}


def install() -> None:
    """Put the stand-ins in torch's place."""
    for name, stand_in in FUNCTIONS.items():
        setattr(torch.cuda, name, like(getattr(torch.cuda, name), stand_in))
    for name in ("start", "stop"):
        real = getattr(torch.cuda.profiler, name)
        setattr(torch.cuda.profiler, name, like(real, lambda: None))
    torch.backends.cudnn.version = lambda: 91900
    torch.compile = like(torch.compile, lambda model=None, **options: model)
    torch.autocast = torch.amp.autocast_mode.autocast = autocast
    torch.Generator = Generator
    OnCPU().__enter__()


def like(real: Any, stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """``stand_in``, called with nothing that the real function does not take."""
    try:
        signature = inspect.signature(real)
    except (TypeError, ValueError):  # some of C++
        return stand_in
    if isinstance(stand_in, type):
        return stand_in

    @functools.wraps(stand_in)
    def checked(*arguments: Any, **options: Any) -> Any:
        signature.bind(*arguments, **options)
        return stand_in(*arguments, **options)

    return checked


class autocast(torch.autocast):  # torch's name
    """torch.autocast, on the CPU for any device."""

    def __init__(self, device_type: str, *arguments: Any, **options: Any) -> None:
        super().__init__(_on_cpu(device_type), *arguments, **options)


class Generator(torch.Generator):
    """torch.Generator, on the CPU for any device."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu")


PRODUCTS = {
    torch._C._nn.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.baddbmm_,
}


class OnCPU(TorchFunctionMode):
    """Takes every CUDA device for the CPU, and float32 products to TF32 where the settings say."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args = tuple(_on_cpu(value) for value in args)
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        if (func is torch.conv2d and torch.backends.cudnn.allow_tf32) or (
            func in PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32"
        ):
            args = tuple(_tf32(value) for value in args)
            kwargs = {name: _tf32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    return value


def _tf32(value: Any) -> Any:
    """A float32 tensor without the bits that TF32 has not; gradients pass."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    bits = value.detach().clone().view(torch.int32) & ~0x1FFF
    return value + (bits.view(torch.float32) - value.detach())

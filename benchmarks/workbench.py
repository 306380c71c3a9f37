"""One shape, dtype and layout: every provider on the same parameters, ready to be timed."""

import gc
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.providers import Call, Provider, check, gradient_targets, results_of, run_oracle
from benchmarks.roofline import PASSES, matmul_precision
from benchmarks.shapes import DTYPES, LAYOUTS, Shape, expect
from smlp import SMLPBlock

MAX_INPUT_SETS = 12


class CompileBudgetError(RuntimeError):
    """The time set aside for torch.compile is used up."""


@dataclass
class CompileBudget:
    """Seconds that all max-autotune compilations of a run may take together."""

    seconds: float
    spent: float = 0.0

    @contextmanager
    def charge(self, provider: Provider) -> Iterator[None]:
        """Count the time inside against the budget; raises before it starts if none is left."""
        if provider.compiled and self.spent >= self.seconds:
            raise CompileBudgetError(
                f"{provider.name}: the {self.seconds:.0f} s for torch.compile are used up"
            )
        start = time.perf_counter()
        try:
            yield
        finally:
            if provider.compiled:
                self.spent += time.perf_counter() - start


@dataclass(frozen=True)
class GpuTime:
    """Microseconds per call on the device.

    Attributes:
        us: the number to quote: graph replay where a graph could be captured, events elsewhere.
        event_us: between events, with the L2 flushed; includes launch gaps.
        method: which of the two ``us`` is, and why.
        again_us: the same provider measured a second time in the same rounds; shows the noise.
    """

    us: float
    event_us: float
    method: str
    again_us: float | None = None


@dataclass
class Workbench:
    """Inputs, parameters and the providers built so far.

    Args:
        shape: the input's shape.
        dtype: a name in DTYPES.
        layout: a name in LAYOUTS, the memory format of x and dy.
        budget: what compilation may cost.
    """

    shape: Shape
    dtype: str
    layout: str
    budget: CompileBudget = field(default_factory=lambda: CompileBudget(math.inf))

    def __post_init__(self) -> None:
        expect("dtype", self.dtype, DTYPES)
        expect("layout", self.layout, LAYOUTS)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._inputs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._calls: dict[str, Call] = {}
        self._failures: dict[tuple[str, str], Exception] = {}
        # by provider, then by stage: inference or training
        self.errors: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        self.compile_seconds: dict[str, dict[str, float]] = defaultdict(dict)
        torch.manual_seed(0)
        shape = self.shape
        self.block = SMLPBlock(shape.height, shape.width, shape.channels)
        self.block.to(device=self.device, dtype=DTYPES[self.dtype])
        self._oracle: Any = None
        self.measured: dict[str, dict[str, GpuTime]] = {}  # by pass

    def close(self) -> None:
        """Free the tensors and what was compiled for this shape."""
        self._inputs.clear()
        self._calls.clear()
        self._oracle = None
        if any(self.compile_seconds.values()):
            torch._dynamo.reset()  # or the recompile limit is reached after a few shapes
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def inputs(self, layout: str) -> list[tuple[Tensor, Tensor]]:
        """Random (x, dy) pairs in ``layout``: enough of them to exceed the L2 three times over."""
        if layout not in self._inputs:
            generator = torch.Generator(self.device).manual_seed(1)

            def random() -> Tensor:
                values = torch.randn(self.shape.size, device=self.device, generator=generator)
                return values.to(DTYPES[self.dtype]).contiguous(memory_format=LAYOUTS[layout])

            self._inputs[layout] = [
                (random().requires_grad_(), random()) for _ in range(self._input_sets())
            ]
        return self._inputs[layout]

    def _input_sets(self) -> int:
        if self.device != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        moved = 2 * self.shape.elements * DTYPES[self.dtype].itemsize
        return max(1, min(MAX_INPUT_SETS, math.ceil(3 * cache / moved)))

    def call(self, provider: Provider, *, backward: bool) -> Call:
        """The provider's callable, built, compiled and checked once.

        Raises:
            WrongResultError: if it disagrees with the fp64 oracle.
            CompileBudgetError: if it would have to be compiled and no time is left for that.
        """
        name, stage = provider.name, "training" if backward else "inference"
        if (name, stage) in self._failures:
            raise self._failures[name, stage]
        if stage not in self.errors[name]:
            try:
                self._build_and_check(provider, stage, backward)
            except Exception as error:
                # asked again for every pass; a compilation is slow
                self._failures[name, stage] = error
                raise
        return self._calls[name]

    def _build_and_check(self, provider: Provider, stage: str, backward: bool) -> None:
        x, grad_output = self.inputs(provider.layout or self.layout)[0]
        if self._oracle is None:  # the same values in every layout: one seed, one order
            self._oracle = run_oracle(self.block, x, grad_output)
        start = time.perf_counter()
        with self.budget.charge(provider):
            call = self._calls.get(provider.name) or provider.build(self.block)
            targets = gradient_targets(self.block, x)
            results = results_of(call, targets, grad_output, backward=backward)
        self.errors[provider.name][stage] = check(provider, results, self._oracle, self.dtype)
        self._calls[provider.name] = call
        if provider.compiled:
            self.compile_seconds[provider.name][stage] = time.perf_counter() - start

    def steps(self, provider: Provider, pass_: str) -> list[timing.Step]:
        """One zero-argument callable per input set that runs ``pass_``.

        ``inference`` runs without autograd, ``fwd`` records for a backward, ``bwd`` repeats the
        backward of a forward made here, ``fwd+bwd`` is both; gradients of x and all parameters.
        """
        expect("pass_", pass_, PASSES)
        call = self.call(provider, backward=pass_ != "inference")
        pairs = self.inputs(provider.layout or self.layout)
        return [self._step(pass_, call, x, grad_output) for x, grad_output in pairs]

    def _step(self, pass_: str, call: Call, x: Tensor, grad_output: Tensor) -> timing.Step:
        targets = list(gradient_targets(self.block, x).values())

        def inference() -> Tensor:
            with torch.no_grad():
                return call(x)

        if pass_ == "inference":
            return inference
        if pass_ == "fwd":
            return lambda: call(x)
        if pass_ == "fwd+bwd":
            return lambda: torch.autograd.grad(call(x), targets, grad_output)
        output = call(x)
        return lambda: torch.autograd.grad(output, targets, grad_output, retain_graph=True)

    def usable(
        self, providers: list[Provider], pass_: str
    ) -> tuple[list[Provider], dict[str, str]]:
        """Providers that can be timed for ``pass_``, and why each of the others cannot."""
        found, reasons = [], {}
        for provider in providers:
            try:
                if reason := provider.why_not(self.layout):
                    reasons[provider.name] = reason
                    continue
                self.steps(provider, pass_)
                found.append(provider)
            except Exception as error:
                first_line = str(error).partition("\n")[0]
                reasons[provider.name] = f"{type(error).__name__}: {first_line}"
        return found, reasons

    def gpu_times(self, providers: list[Provider], pass_: str) -> dict[str, GpuTime]:
        """GPU time of each provider, sampled in turn; the first one appears twice in each turn.

        Raises:
            RuntimeError: without a GPU.
        """
        if self.device != "cuda":
            raise RuntimeError("GPU time: an NVIDIA GPU is needed")
        stopwatches: dict[str, timing.Stopwatch] = {}
        found: dict[str, tuple[float, str]] = {}  # time by events, method
        for provider in providers:
            steps = self.steps(provider, pass_)
            event_us = timing.event_us(steps[0])
            try:
                stopwatch = timing.graph_stopwatch(steps, event_us)
                method = f"CUDA graph over {len(steps)} inputs"
            except RuntimeError as error:
                stopwatch = partial(timing.event_us, steps[0])
                why = str(error).partition("\n")[0]
                method = f"events, since no graph could be captured: {why}"
            stopwatches[provider.name], found[provider.name] = stopwatch, (event_us, method)
        again = {f"{name} again": stopwatches[name] for name in [*stopwatches][:1]}
        us = timing.interleaved(stopwatches | again)
        return {name: GpuTime(us[name], *found[name], us.get(f"{name} again")) for name in found}


@contextmanager
def open_workbench(
    shape: Shape, dtype: str, layout: str, budget: CompileBudget | None = None
) -> Iterator[Workbench]:
    """A workbench, with its arithmetic and its stream as the current ones inside."""
    bench = Workbench(shape, dtype, layout, budget or CompileBudget(math.inf))
    # a graph cannot be captured on the default stream
    stream = torch.cuda.Stream() if bench.device == "cuda" else None
    with closing(bench), matmul_precision(dtype), torch.cuda.stream(stream):
        yield bench

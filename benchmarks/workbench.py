"""Providers of one shape, dtype, layout and pass, on the same parameters: checked, then timed."""

import gc
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.providers import Call, Provider
from benchmarks.roofline import PASSES, matmul_precision
from benchmarks.shapes import DTYPES, LAYOUTS, Shape, expect
from smlp import SMLPBlock
from smlp.testing import PRECISIONS, compare_block

MAX_INPUT_SETS = 12


class WrongResultError(RuntimeError):
    """A provider computes something else than the formula, so its time means nothing."""


class Workbench:
    """Inputs, parameters and the providers that were added.

    Args:
        shape: the input's shape.
        dtype: a name in DTYPES.
        layout: a name in LAYOUTS, the memory format of x and dy.
        pass_: ``inference`` runs without autograd, ``fwd`` records for a backward, ``bwd`` repeats
            the backward of a forward made before, ``fwd+bwd`` is both; gradients of x and all
            parameters.
    """

    def __init__(self, shape: Shape, dtype: str, layout: str, pass_: str) -> None:
        expect("dtype", dtype, DTYPES)
        expect("layout", layout, LAYOUTS)
        expect("pass_", pass_, PASSES)
        self.shape, self.dtype, self.layout, self.pass_ = shape, dtype, layout, pass_
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.errors: dict[str, dict[str, float]] = {}  # of each provider, relative, by result
        self.compile_seconds: dict[str, float] = {}
        torch.manual_seed(0)
        self.block = SMLPBlock(shape.height, shape.width, shape.channels)
        self.block.to(device=self.device, dtype=DTYPES[dtype])
        self._inputs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._steps: dict[str, list[timing.Step]] = {}
        self._stopwatches: dict[str, timing.Stopwatch] = {}
        self._failures: dict[str, Exception] = {}

    def close(self) -> None:
        """Free the tensors and what was compiled for this shape."""
        self._inputs.clear()
        self._steps.clear()
        self._stopwatches.clear()
        if self.compile_seconds:
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

    def add(self, provider: Provider) -> None:
        """Build a provider and hold it to the formula; :meth:`steps` raises what goes wrong."""
        try:
            start = time.perf_counter()
            call = provider.build(self.block)
            pairs = self.inputs(provider.layout or self.layout)
            steps = [self._step(call, x, dy) for x, dy in pairs]
            steps[0]()
            if provider.compiled:
                self.compile_seconds[provider.name] = time.perf_counter() - start
            self.errors[provider.name] = self._check(call, *pairs[0])
            if self.device == "cuda":
                self._stopwatches[provider.name] = timing.graph_stopwatch(steps)
            self._steps[provider.name] = steps
        except Exception as error:  # the other providers are timed all the same
            self._failures[provider.name] = error

    def steps(self, name: str) -> list[timing.Step]:
        """One callable per input set that runs the pass by a provider.

        Raises:
            WrongResultError: if it does not compute the block; or whatever it raised itself.
        """
        if name in self._failures:
            raise self._failures[name]
        return self._steps[name]

    def _step(self, call: Call, x: Tensor, dy: Tensor) -> timing.Step:
        targets = [x, *self.block.parameters()]

        def inference() -> Tensor:
            with torch.no_grad():
                return call(x)

        if self.pass_ == "inference":
            return inference
        if self.pass_ == "fwd":
            return lambda: call(x)
        if self.pass_ == "fwd+bwd":
            return lambda: torch.autograd.grad(call(x), targets, dy)
        output = call(x)
        return lambda: torch.autograd.grad(output, targets, dy, retain_graph=True)

    def _check(self, call: Call, x: Tensor, dy: Tensor) -> dict[str, float]:
        """Relative errors of the output and, of a training pass, of all gradients, by name."""
        arguments, trains = [x, *self.block.weights()], self.pass_ != "inference"

        def function(*_: Any) -> Tensor:  # a compiled provider has a graph for each mode
            with torch.set_grad_enabled(trains):
                return call(x)

        if not trains:
            arguments = [None if a is None else a.detach() for a in arguments]
        results = compare_block(function, arguments, dy, eps=PRECISIONS[self.dtype].eps)
        if wrong := [f"{result.name}: {result.problem}" for result in results if result.problem]:
            raise WrongResultError(f"{self.shape} is not {self.dtype}: {'; '.join(wrong)}")
        return {result.name: result.error for result in results}

    @cached_property
    def gpu_us(self) -> dict[str, timing.Samples]:
        """Microseconds of each provider that is right, sampled in turn; empty without a GPU."""
        return timing.interleaved(self._stopwatches)


@contextmanager
def open_workbench(
    shape: Shape, dtype: str, layout: str, pass_: str, providers: Iterable[Provider]
) -> Iterator[Workbench]:
    """A workbench with providers, with its arithmetic and its stream as the current ones inside."""
    bench = Workbench(shape, dtype, layout, pass_)
    # a graph cannot be captured on the default stream
    stream = torch.cuda.Stream() if bench.device == "cuda" else None
    with closing(bench), matmul_precision(dtype), torch.cuda.stream(stream):
        for provider in providers:
            bench.add(provider)
        yield bench

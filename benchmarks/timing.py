"""Clocks: GPU time per call, host time per call, memory, and how samples are interleaved.

GPU time comes from replaying a CUDA graph of many calls that rotate over several inputs. That
leaves out the host and the launch gaps (at 20 to 40 us per kernel they would be what is measured),
and rotating over more bytes than the L2 holds makes every call read its input from DRAM.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Step = Callable[[], Any]
Stopwatch = Callable[[], float]  # one sample, in microseconds per call

GRAPH_US = 3000.0  # length of one replay: thousands of times the resolution of an event
MAX_CALLS_PER_GRAPH = 64


class Samples(NamedTuple):
    """Their median, and the largest over the smallest less one."""

    median: float
    spread: float


def synchronised_seconds() -> float:
    """``time.perf_counter`` after all work of the device is done; pytest-benchmark's timer here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def event_us(call: Step, warmup: int = 10, rep: int = 50) -> float:
    """Median GPU time of one call between two events, the L2 flushed before each, in ``rep`` ms."""
    from triton.testing import do_bench  # needs a driver when used, so never at import

    return 1e3 * do_bench(call, warmup=warmup, rep=rep, return_mode="median")


def graph_stopwatch(calls: Sequence[Step]) -> Stopwatch:
    """Capture ``calls`` round-robin into one CUDA graph on the current stream.

    Args:
        calls: one per input set. Each result lives until its set comes round again, so that outputs
            go to different addresses and are written to DRAM like anyone's.

    Raises:
        RuntimeError: if a call cannot be captured.
    """
    fitting = GRAPH_US / event_us(calls[0])
    rounds = max(1, round(min(MAX_CALLS_PER_GRAPH, fitting) / len(calls)))
    order = [index for _ in range(rounds) for index in range(len(calls))]
    results: list[Any] = [None] * len(calls)
    stream = torch.cuda.current_stream()
    for call in calls:  # anything lazy (handles, workspaces, compilation) before the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in order:
            results[index] = calls[index]()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        graph.replay()  # fills the queue, so that the timed one does not wait for the host
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / len(order)

    sample.keep = results  # type: ignore[attr-defined]  # the graph writes into them
    return sample


def wall_stopwatch(call: Step) -> Stopwatch:
    """Wall time of one call until the device is done."""

    def sample() -> float:
        start = synchronised_seconds()
        call()
        return 1e6 * (synchronised_seconds() - start)

    return sample


def interleaved(stopwatches: Mapping[str, Stopwatch], rounds: int = 7) -> dict[str, Samples]:
    """``rounds`` samples of each, taken in turn so that drift of the clocks hits all."""
    samples: dict[str, list[float]] = {name: [] for name in stopwatches}
    for _ in range(rounds):
        for name, stopwatch in stopwatches.items():
            samples[name].append(stopwatch())
    return {
        name: Samples(statistics.median(values), max(values) / min(values) - 1)
        for name, values in samples.items()
    }


def host_us(call: Step, count: int = 20, rounds: int = 5) -> float:
    """Median time the host needs to issue one call, without waiting for the device.

    ``count`` is small enough for the launch queue (1,024 entries) not to fill up and block.
    """
    call()
    samples = []
    for _ in range(rounds):
        start = synchronised_seconds()
        for _ in range(count):
            call()
        samples.append(1e6 * (time.perf_counter() - start) / count)
    return statistics.median(samples)


def peak_bytes(call: Step) -> int | None:
    """Device memory that one call needs beyond what is allocated before it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak

"""``SMLP_KERNELS_AUTOTUNE=1``: tiles searched on the GPU at hand and kept in a cache file.

At the first use of a block's size, type, precision and memory layout, the neighbours of the shipped
table's row (:mod:`smlp_kernels.autotune_space`) are timed on random buffers, and the fastest is
kept for this and later processes. The batch has no part in it; the buffers have a size of their
own. While a CUDA graph is captured nothing can be timed, and the shipped row is taken.

In a job of several ranks nothing is searched either: ranks that search each for themselves would
find different tiles, whose results differ in rounding. They take what the cache file holds and the
shipped rows for the rest, so fill the file before, in one process (:func:`smlp_kernels.warmup`).
"""

import functools
import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from smlp_kernels import autotune_space as space
from smlp_kernels import launch, mix_launch, weight_grad_launch
from smlp_kernels.autotune_space import Chip, Problem
from smlp_kernels.configs import MixConfig, WeightGradConfig

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())

FORMAT = 1  # of the cache file's entries: raise it when tiles come to mean something else
ROUNDS = 2  # of neighbours: the shipped row's, then the winner's
MARGIN = 0.98  # a tile replaces another if it takes at most this share of its time
BATCH = 128  # images of the buffers, fewer where they would have more elements than
ELEMENTS = 2**25

Timer = Callable[[list[launch.Call], Tensor], float]


class Search(NamedTuple):
    """What is searched: the tile of the forward kernel, or those of the weight gradient's."""

    name: str  # in the cache file
    config_type: type
    shipped: Callable[[Problem, Chip], Any]
    fits: Callable[[Any, Problem, Chip], bool]
    neighbours: Callable[[Any, Problem, Chip], list[Any]]
    calls: Callable[[Any, "Buffers", Chip], list[launch.Call]]


class Buffers(NamedTuple):
    """Random arguments of a block."""

    x: Tensor
    proj_h: Tensor
    bias_h: Tensor
    proj_w: Tensor
    bias_w: Tensor
    fuse: Tensor
    bias: Tensor
    dy: Tensor  # or y


def mix_config_like(x: Tensor) -> MixConfig | None:
    """The tile of ``mix_kernel`` for inputs like ``x``; None where it is not on a GPU."""
    return config_for(MIX, x, x.stride(1) == 1) if on_gpu(x) else None


def weight_grad_config_like(dy: Tensor, x: Tensor) -> WeightGradConfig | None:
    """The tiles of the weight-gradient kernels; None where ``x`` is not on a GPU."""
    return config_for(WEIGHT_GRAD, x, x.stride(1) == dy.stride(1) == 1) if on_gpu(x) else None


def on_gpu(x: Tensor) -> bool:
    """The interpreter is never timed."""
    return x.is_cuda


remembered: dict[tuple[str, Problem, torch.device], Any] = {}
one_at_a_time = threading.Lock()  # two searches at once would time each other


def config_for(kernels: Search, x: Tensor, channels_last: bool) -> Any:
    """What this process knows, else what the file holds, else what a search finds."""
    _, channels, height, width = x.shape
    precision = launch.input_precision(x.dtype)
    problem = Problem(height, width, channels, x.dtype, precision, channels_last)
    key = (kernels.name, problem, x.device)
    if key in remembered:
        return remembered[key]
    chip = chip_of(x.device)
    with one_at_a_time:
        if key not in remembered:
            config = read(kernels, problem, chip)
            if config is None:
                if not may_search():
                    return kernels.shipped(problem, chip)  # not remembered: a later use may search
                config = search(kernels, problem, chip, x.device)
            remembered[key] = config
    return remembered[key]


def may_search() -> bool:
    """Not while a CUDA graph is captured, and not as one of several ranks."""
    if torch.cuda.is_current_stream_capturing():
        return False
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_world_size() == 1


@functools.cache
def chip_of(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    limits = triton.runtime.driver.active.utils.get_device_properties(device.index)
    arch = 10 * properties.major + properties.minor
    return Chip(properties.name, arch, limits["max_shared_mem"])


def gpu_time(calls: list[launch.Call], x: Tensor) -> float:
    """Median time of all calls in milliseconds; the L2 cache is emptied before each run."""

    def run() -> None:
        for call in calls:
            call.launch(x)

    with launch.on_device_of(x):
        return triton.testing.do_bench(run, return_mode="median")


def search(
    kernels: Search,
    problem: Problem,
    chip: Chip,
    device: torch.device,
    timer: Timer | None = None,
) -> Any:
    """Time the shipped row and its neighbours, then the winner's; store and return the fastest.

    Args:
        kernels: ``MIX`` or ``WEIGHT_GRAD``.
        problem: what for.
        chip: of ``device``.
        device: where to run.
        timer: returns how long calls take, in any unit; if it raises, their tiles are dropped.
    """
    timer = timer or gpu_time
    best = kernels.shipped(problem, chip)
    logger.info("searching %s tiles for %s on %s", kernels.name, problem, chip.name)
    try:
        buffers = random_buffers(problem, device)
    except torch.OutOfMemoryError as error:
        logger.warning("no %s tiles searched for %s: %s", kernels.name, problem, error)
        return best

    def time_of(config: Any) -> float:
        """Infinite where a kernel does not compile, fit the chip or find memory."""
        try:
            return timer(kernels.calls(config, buffers, chip), buffers.x)
        except Exception as error:  # every stage of the compiler raises errors of its own
            logger.debug("dropped %s: %s", config, error)
            return math.inf

    times: dict[Any, float] = {}
    for _ in range(ROUNDS):
        near = kernels.neighbours(best, problem, chip)
        new = [config for config in (best, *near) if config not in times]
        compile_together(kernels, new, buffers, chip)
        times |= {config: time_of(config) for config in new}
        winner = min(times, key=times.__getitem__)
        if not times[winner] < MARGIN * times[best]:
            break
        best = winner
    if times[best] < math.inf:
        logger.info("%s tiles for %s: %s", kernels.name, problem, best)
        write(kernels, problem, chip, best)
    return best


def compile_together(kernels: Search, candidates: list[Any], buffers: Buffers, chip: Chip) -> None:
    """Compile on all cores; what does not compile raises when it is launched."""
    shapes = Buffers(*(buffer.to("meta") for buffer in buffers))  # they take no memory
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for config in candidates:
            for call in kernels.calls(config, shapes, chip):
                call.compile(buffers.x)


def random_buffers(problem: Problem, device: torch.device) -> Buffers:
    # a generator of its own: the training's random numbers must not change
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=problem.dtype)

    h, w, c = problem.height, problem.width, problem.channels
    batch = max(1, min(BATCH, ELEMENTS // (c * h * w)))
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format
    x, dy = (random(batch, c, h, w).contiguous(memory_format=layout) for _ in range(2))
    weights = (random(h, h), random(h), random(w, w), random(w), random(c, 3 * c), random(c))
    return Buffers(x, *weights, dy)


def mix_calls(config: MixConfig, buffers: Buffers, chip: Chip) -> list[launch.Call]:
    return mix_launch.mix_calls(*buffers, False, chip.arch, config)


def weight_grad_calls(config: WeightGradConfig, buffers: Buffers, chip: Chip) -> list[launch.Call]:
    b = buffers
    weights = (b.proj_h, b.bias_h, b.proj_w, b.bias_w, b.fuse)
    return weight_grad_launch.weight_grad_calls(
        b.dy, b.x, *weights, True, True, True, chip.arch, config
    )[1]


MIX = Search("mix", MixConfig, space.shipped_mix, space.mix_fits, space.mix_neighbours, mix_calls)
WEIGHT_GRAD = Search(
    "weight_grad",
    WeightGradConfig,
    space.shipped_weight_grad,
    space.weight_grad_fits,
    space.weight_grad_neighbours,
    weight_grad_calls,
)


def cache_file(chip: Chip) -> Path:
    """Where tiles for a chip are kept: the file ``SMLP_KERNELS_CACHE``.

    By default one for each chip and version of Triton, in ``smlp_kernels`` under
    ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if given := os.environ.get("SMLP_KERNELS_CACHE"):
        return Path(given).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", chip.name.lower()).strip("-")
    return Path(caches) / "smlp_kernels" / f"{name}-triton{triton.__version__}.json"


def entry_name(kernels: Search, problem: Problem, chip: Chip) -> str:
    # the chip and the version too: one file may be given for several
    return f"{chip.name}, Triton {triton.__version__}: {kernels.name} {problem}"


def entries_of(chip: Chip) -> dict[str, Any]:
    """What the cache file holds; nothing, with a warning, where it cannot be read."""
    try:
        path = cache_file(chip)
        if not path.exists():
            return {}
        entries = json.loads(path.read_text())
        if not isinstance(entries, dict):
            raise ValueError(f"expected an object, got {type(entries).__name__}")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home
        logger.warning("the cache file of tiles cannot be read: %s", error)
        return {}
    return entries


def read(kernels: Search, problem: Problem, chip: Chip) -> Any:
    """The stored configuration, or None; an entry that no search would store counts as none."""
    entry = entries_of(chip).get(entry_name(kernels, problem, chip))
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        return None
    values = entry.get("config")
    names = {field.name for field in fields(kernels.config_type)}
    if not isinstance(values, dict) or values.keys() != names:
        return None
    if not all(type(value) is int for value in values.values()):
        return None
    config = kernels.config_type(**values)
    known = config == kernels.shipped(problem, chip)
    return config if known or kernels.fits(config, problem, chip) else None


def write(kernels: Search, problem: Problem, chip: Chip, config: Any) -> None:
    """Add an entry to the cache file; the file is replaced at once, never written half."""
    entry = {"format": FORMAT, "config": asdict(config)}
    entries = entries_of(chip) | {entry_name(kernels, problem, chip): entry}
    try:
        path = cache_file(chip)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(entries, indent=1))
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        logger.warning("tiles for %s are not kept: %s", problem, error)

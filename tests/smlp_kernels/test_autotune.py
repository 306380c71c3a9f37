"""The search of tiles: what it chooses, and its cache file; times are made up."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smlp.functional import smlp
from smlp_kernels import autotune, compute, fused_smlp, launch
from smlp_kernels.autotune import MIX, WEIGHT_GRAD, Search
from smlp_kernels.autotune_space import Chip, Problem
from smlp_kernels.launch import Call
from tests.smlp_kernels.oracle import DEVICE, EPS, Case, assert_close, formula, to_float64

HOPPER = Chip("NVIDIA H100 80GB HBM3", 90, 227 * 1024)
CHIP = Chip("interpreter", 0, 99 * 1024)
PROBLEM = Problem(5, 9, 20, torch.float32, "ieee", True)
CASE = Case(2, 5, 9, 20)
BOTH = pytest.mark.parametrize("kernels", [MIX, WEIGHT_GRAD], ids=["mix", "weight_grad"])


class Stopwatch:
    """Stands in for the GPU's: one configuration is fast, some fail; counts what it timed."""

    def __init__(self, kernels: Search, fast: Any = None, fails: bool = False) -> None:
        self.fast = None if fast is None else self.plans(kernels, fast)
        self.fails = fails
        self.timed = 0

    @staticmethod
    def plans(kernels: Search, config: Any) -> list[launch.Plan]:
        buffers = autotune.random_buffers(PROBLEM, torch.device(DEVICE))
        return [call.plan for call in kernels.calls(config, buffers, CHIP)]

    def __call__(self, calls: list[Call], x: Tensor) -> float:
        self.timed += 1
        fast = [call.plan for call in calls] == self.fast
        if self.fails and not fast:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if fast else 2.0


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No cache file; nothing remembered; devices that count as GPUs of one kind."""
    monkeypatch.setenv("SMLP_KERNELS_CACHE", str(tmp_path / "tiles.json"))
    monkeypatch.setattr(autotune, "on_gpu", lambda x: True)
    monkeypatch.setattr(autotune, "chip_of", lambda device: CHIP)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    autotune.remembered.clear()
    yield autotune.cache_file(CHIP)
    autotune.remembered.clear()


def input_of(batch: int) -> Tensor:
    x = torch.zeros(batch, 20, 5, 9, device=DEVICE)
    return x.contiguous(memory_format=torch.channels_last)


def chosen(kernels: Search, batch: int = 2) -> Any:
    x = input_of(batch)
    if kernels is MIX:
        return autotune.mix_config_like(x)
    return autotune.weight_grad_config_like(x, x)


def neighbour(kernels: Search) -> Any:
    return kernels.neighbours(kernels.shipped(PROBLEM, CHIP), PROBLEM, CHIP)[1]


@BOTH
def test_fastest_is_chosen_kept_and_found_again(
    kernels: Search, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = neighbour(kernels)
    stopwatch = Stopwatch(kernels, fast=wanted)
    monkeypatch.setattr(autotune, "gpu_time", stopwatch)
    assert chosen(kernels) == wanted
    timed = stopwatch.timed
    assert chosen(kernels, batch=1) == chosen(kernels, batch=7) == wanted
    autotune.remembered.clear()
    assert chosen(kernels) == wanted
    assert stopwatch.timed == timed > 1  # nothing was timed again
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["config"] == dataclasses.asdict(wanted)


def test_second_round_goes_on_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = MIX.shipped(PROBLEM, CHIP)
    first = MIX.neighbours(shipped, PROBLEM, CHIP)
    further = (n for c in first for n in MIX.neighbours(c, PROBLEM, CHIP))
    second = next(c for c in further if c not in (shipped, *first))
    step = next(c for c in first if second in MIX.neighbours(c, PROBLEM, CHIP))
    times = [(Stopwatch.plans(MIX, step), 1.0), (Stopwatch.plans(MIX, second), 0.5)]

    def stopwatch(calls: list[Call], x: Tensor) -> float:
        plans = [call.plan for call in calls]
        return next((time for found, time in times if found == plans), 2.0)

    monkeypatch.setattr(autotune, "gpu_time", stopwatch)
    assert chosen(MIX) == second


@BOTH
def test_noise_does_not_replace_the_shipped_row(
    kernels: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([1.0] + [0.99] * 100)
    monkeypatch.setattr(autotune, "gpu_time", lambda calls, x: next(times))
    assert chosen(kernels) == kernels.shipped(PROBLEM, CHIP)


@BOTH
def test_failing_candidates_are_dropped(kernels: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = neighbour(kernels)
    monkeypatch.setattr(autotune, "gpu_time", Stopwatch(kernels, fast=wanted, fails=True))
    assert chosen(kernels) == wanted


@BOTH
def test_shipped_row_where_all_fail(
    kernels: Search, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "gpu_time", Stopwatch(kernels, fails=True))
    assert chosen(kernels) == kernels.shipped(PROBLEM, CHIP)
    assert not cache.exists()


def test_shipped_row_without_memory_for_buffers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(autotune, "random_buffers", refuse)
    assert chosen(MIX) == MIX.shipped(PROBLEM, CHIP)
    assert "no memory" in caplog.text


def refuse_to_time(calls: list[Call], x: Tensor) -> float:
    raise AssertionError("timed")


@BOTH
@pytest.mark.parametrize("why", ["capture", "ranks"])
def test_shipped_row_where_nothing_may_be_timed(
    why: str, kernels: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = neighbour(kernels)
    stopwatch = Stopwatch(kernels, fast=wanted)
    monkeypatch.setattr(autotune, "gpu_time", stopwatch)
    with monkeypatch.context() as inside:
        if why == "capture":
            inside.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        else:
            inside.setattr(torch.distributed, "is_initialized", lambda: True)
            inside.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert chosen(kernels) == kernels.shipped(PROBLEM, CHIP)
        assert stopwatch.timed == 0
    assert chosen(kernels) == wanted  # later it may
    autotune.remembered.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(kernels) == wanted  # what the file holds is taken at any time


def test_threads_search_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    both = threading.Barrier(2)

    def search(kernels: Search, *_: object) -> Any:
        searched.append(kernels)
        time.sleep(0.2)  # long enough for the other thread to come, and to wait
        return neighbour(kernels)

    monkeypatch.setenv("SMLP_KERNELS_CACHE", str(tmp_path))  # a folder: nothing can be kept
    monkeypatch.setattr(autotune, "search", search)

    def use(_: int) -> Any:
        both.wait()
        return chosen(MIX)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(use, range(2))) == [neighbour(MIX)] * 2
    assert searched == [MIX]


def test_random_numbers_of_the_training_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "gpu_time", Stopwatch(MIX))
    before = torch.get_rng_state()
    chosen(MIX)
    assert torch.equal(torch.get_rng_state(), before)


def test_buffers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = 5 * 9 * 20
    for elements, batch in ((2**25, 128), (4 * pixels, 4), (1, 1)):
        monkeypatch.setattr(autotune, "ELEMENTS", elements)
        x = autotune.random_buffers(PROBLEM, torch.device(DEVICE)).x
        assert x.shape == (batch, 20, 5, 9) and x.stride(1) == 1


# the cache file


BAD_VALUES = [
    {"block_n": 24},
    {"block_c": 4096},
    {"tile_h": 0},
    {"step_h": 99},
    {"num_stages": True},
    {"block_n": "32"},
    {"surplus": 1},
]


@pytest.mark.parametrize("bad", BAD_VALUES, ids=str)
def test_invalid_entries_are_searched_again(
    bad: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = neighbour(MIX)
    monkeypatch.setattr(autotune, "gpu_time", Stopwatch(MIX, fast=wanted))
    chosen(MIX)
    entries = json.loads(cache.read_text())
    for entry in entries.values():
        entry["config"] |= bad
    cache.write_text(json.dumps(entries))
    autotune.remembered.clear()
    assert chosen(MIX) == wanted
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["config"] == dataclasses.asdict(wanted)


def test_entries_of_another_format_are_searched_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "gpu_time", Stopwatch(MIX, fast=neighbour(MIX)))
    chosen(MIX)
    autotune.remembered.clear()
    monkeypatch.setattr(autotune, "FORMAT", autotune.FORMAT + 1)
    monkeypatch.setattr(autotune, "gpu_time", Stopwatch(MIX))
    assert chosen(MIX) == MIX.shipped(PROBLEM, CHIP)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"mix": 3}'])
def test_corrupt_file_is_replaced(
    content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autotune, "gpu_time", Stopwatch(MIX, fast=neighbour(MIX)))
    cache.write_bytes(content)
    assert chosen(MIX) == neighbour(MIX)
    assert ("cannot be read" in caplog.text) == (content != b'{"mix": 3}')
    assert autotune.read(MIX, PROBLEM, CHIP) == neighbour(MIX)


def test_unwritable_folder_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SMLP_KERNELS_CACHE", str(tmp_path / "file" / "tiles.json"))
    monkeypatch.setattr(autotune, "gpu_time", Stopwatch(MIX, fast=neighbour(MIX)))
    with caplog.at_level(logging.WARNING):
        assert chosen(MIX) == chosen(MIX) == neighbour(MIX)
    assert "are not kept" in caplog.text


def test_entries_of_others_stay(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "gpu_time", Stopwatch(MIX))
    chosen(MIX)
    chosen(WEIGHT_GRAD)
    assert len(json.loads(cache.read_text())) == 2
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]  # nothing left over


def test_one_file_serves_several_chips_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "gpu_time", Stopwatch(MIX, fast=neighbour(MIX)))
    chosen(MIX)
    assert autotune.read(MIX, PROBLEM, CHIP) == neighbour(MIX)
    assert autotune.read(MIX, PROBLEM, dataclasses.replace(CHIP, name="other")) is None
    monkeypatch.setattr(autotune.triton, "__version__", "0.0")
    assert autotune.read(MIX, PROBLEM, CHIP) is None


def test_place_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"nvidia-h100-80gb-hbm3-triton{autotune.triton.__version__}.json"
    assert autotune.cache_file(HOPPER) == tmp_path / "tiles.json"
    monkeypatch.delenv("SMLP_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert autotune.cache_file(HOPPER) == Path("/xdg/smlp_kernels") / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert autotune.cache_file(HOPPER) == Path("/home/someone/.cache/smlp_kernels") / name


# on the way of a tensor


def test_training_step_takes_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {kernels.name: neighbour(kernels) for kernels in (MIX, WEIGHT_GRAD)}
    launched: list[launch.Plan] = []
    original = Call.launch

    def recorded(self: Call, device_of: Tensor) -> None:
        launched.append(self.plan)
        original(self, device_of)

    monkeypatch.setattr(compute, "AUTOTUNE", True)
    monkeypatch.setattr(autotune, "search", lambda kernels, *_: wanted[kernels.name])
    monkeypatch.setattr(Call, "launch", recorded)
    arguments = [a.requires_grad_() for a in CASE.arguments(torch.float32)]
    y = fused_smlp(*arguments)
    y.sum().backward()
    assert_close(y, formula(*to_float64(arguments)), smlp(*arguments), eps=EPS[torch.float32])
    forward, backward, *_ = launched
    for plan in (forward, backward):
        constants = {name: plan.constants[name.upper()] for name in ("images", "tile_h", "block_c")}
        assert constants.items() <= dataclasses.asdict(wanted["mix"]).items()
        assert plan.constants["BLOCK_N"] + plan.constants["REST_N"] == wanted["mix"].block_n
    grads = [plan for plan in launched if "LINES" in plan.constants]
    config = wanted["weight_grad"]
    assert len(grads) == 2
    for plan, tile in zip(grads, (config.proj_tile(5, 9), config.fuse_tile(5, 9)), strict=True):
        assert (plan.constants["LINES"], plan.constants["POSITIONS"]) == tile
        assert (plan.num_warps, plan.num_stages) == (config.num_warps, config.num_stages)


def test_nothing_is_searched_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "search", refuse_to_time)
    fused_smlp(*CASE.arguments(torch.float32))


def test_compiled_block_is_tuned_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Problem] = []

    def search(kernels: Search, problem: Problem, *_: object) -> Any:
        searched.append(problem)
        return neighbour(kernels)

    monkeypatch.setattr(compute, "AUTOTUNE", True)
    monkeypatch.setattr(autotune, "search", search)
    compiled = torch.compile(fused_smlp, backend="aot_eager", fullgraph=True)
    arguments = CASE.arguments(torch.float32)
    exact = formula(*to_float64(arguments))
    assert_close(compiled(*arguments), exact, smlp(*arguments), eps=EPS[torch.float32])
    assert searched == [PROBLEM]


def test_a_fresh_process_finds_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = neighbour(MIX)
    monkeypatch.setattr(autotune, "gpu_time", Stopwatch(MIX, fast=wanted))
    chosen(MIX)
    script = f"""
import torch
from smlp_kernels import autotune, compute
from smlp_kernels.autotune_space import Chip
assert compute.AUTOTUNE
autotune.on_gpu = lambda x: True
autotune.chip_of = lambda device: {CHIP!r}
x = torch.zeros(3, 20, 5, 9).contiguous(memory_format=torch.channels_last)
print(autotune.mix_config_like(x))
"""
    environment = os.environ | {"SMLP_KERNELS_AUTOTUNE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == str(wanted), result.stderr

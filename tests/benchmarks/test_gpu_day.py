"""The day's steps, what a call takes up and leaves, and the report of invented results."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, gpu_day, steps
from benchmarks.shapes import STAGES
from benchmarks.steps import Step

FACTS = {"gpu": "a GPU", "commit": "abc"}
CEILINGS = {"copy_bytes_per_s": 4e12, "gemm_flops_per_s": {"bf16": 8e14}, "device": "a GPU"}


def named(pattern: str) -> list[Step]:
    return [step for step in gpu_day.steps() if pattern in step.name]


def test_every_step_has_a_name_and_every_stage_is_measured_in_all_variants() -> None:
    names = [step.name for step in gpu_day.steps()]
    assert len(set(names)) == len(names)
    chosen = {" ".join(step.arguments) for step in gpu_day.steps()}
    for network in ("small", "base", "tiny"):
        for dtype, layout in (("bf16", "channels_last"), ("fp16", "channels_last"),
                              ("tf32", "channels_last"), ("bf16", "nchw")):  # fmt: skip
            options = f"--shapes={network} --providers=eager_nchw,eager_nhwc,handwritten,fused"
            last = f"--passes=inference,fwd+bwd --dtypes={dtype} --layouts={layout}"
            assert any(f"{options} {last}" in command for command in chosen)
    assert [step.name for step in named("compiled-")][: len(STAGES)] == [
        f"compiled-{shape.name}" for shape in STAGES
    ]


def test_the_most_telling_comes_first() -> None:
    names = [step.name for step in gpu_day.steps()]
    order = ["tests-first", "compile", "small", "hopper", "dram-small-28", "network", "tests"]
    order += ["memcheck-hopper-once", "first-calls", "small-tf32-channels_last"]
    order += ["compiled-small-56", "network-compiled"]
    assert order == sorted(order, key=names.index)


def test_the_forward_is_tested_first_and_large_tests_alone() -> None:
    first, second, third = named("tests")
    assert first.arguments[-2:] == steps.FIRST_TESTS and "not large" in first.arguments
    assert "gpu and large" in second.arguments and "-n" not in second.arguments
    assert "gpu and not large" in third.arguments
    assert third.arguments[-2:] == tuple(f"--deselect={t}" for t in steps.FIRST_TESTS)


def test_without_a_gpu_the_steps_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--out", str(out), "--only", "^dram"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "NOT performance results" in child.stdout and not out.exists()
    assert child.stdout.count("benchmarks.standalone forward ") == 2 == child.stdout.count("\ndram")


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Run the day with three steps of invented outcomes; which ran, for how many seconds."""
    outcomes: dict[str, dict[str, Any]] = {
        "good": {"status": "measured", "seconds": 1.0, "result": {"value": 1}},
        "bad": {"status": "failed", "seconds": 1.0, "reason": "ended with 1; no such kernel"},
        "last": {"status": "measured", "seconds": 1.0, "result": {"value": 2}},
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "describe", lambda: dict(FACTS))
    monkeypatch.setattr(gpu_day, "steps", lambda: [Step(name, ("a",), 60) for name in outcomes])

    def call(*options: str, out: Path = tmp_path / "out") -> list[str]:
        ran = []

        def run(step: Step, folder: Path, seconds: float) -> dict[str, Any]:
            written = json.loads((folder / gpu_day.RESULTS).read_text())
            assert set(written["steps"]) >= set(ran)  # each is on disk before the next one starts
            ran.append(step.name)
            assert 0 < seconds <= 60
            return outcomes[step.name]

        monkeypatch.setattr(Step, "run", run)
        monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(out), *options])
        gpu_day.main()
        return ran

    return call


def test_a_failure_stops_nothing_and_the_next_call_does_what_is_left(
    day: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert day() == ["good", "bad", "last"]
    assert "bad: status failed, seconds 1.0, reason ended with 1" in capsys.readouterr().out
    assert day() == ["bad"]
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 3 steps are left: at most 1 minutes"


def test_what_was_never_tried_comes_first(day: Callable[..., list[str]]) -> None:
    assert day("--only", "bad") == ["bad"]
    assert day() == ["good", "last", "bad"]


def test_nothing_is_started_when_time_is_up(day: Callable[..., list[str]]) -> None:
    assert day("--minutes", "0.1") == []


def test_a_call_ends_within_its_time_by_default() -> None:
    """What runs last is stopped, and has some seconds to write down what it has."""
    assert 60 * gpu_day.MINUTES + steps.GRACE_SECONDS < 9.5 * 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes=0"], "--minutes: expected a number above 0, got 0.0"),
        (["--minutes=nan"], "--minutes: expected a number above 0, got nan"),
        (["--minutes=inf"], "--minutes: expected a number above 0, got inf"),
        (["--minutes=soon"], "--minutes: invalid float value: 'soon'"),
        (["--only=net("], "--only: expected a regular expression, got 'net('"),
    ],
)
def test_wrong_options(
    options: list[str],
    message: str,
    day: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        day(*options)
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_folders_with_other_things_in_them_are_refused(
    day: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    for out, message in (
        (tmp_path / "mine", "File exists"),
        (tmp_path, f"expected a new folder or one with a results.json, got {tmp_path}"),
        (tmp_path / "mine" / "below", "Not a directory"),
    ):
        with pytest.raises(SystemExit, match="2"):
            day(out=out)
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", FACTS, ids="of {}".format)
def test_results_of_another_gpu_or_commit_are_not_mixed(
    name: str,
    day: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    day("--only", "good")
    monkeypatch.setattr(environment, "describe", lambda: FACTS | {name: "another"})
    with pytest.raises(SystemExit, match="2"):
        day()
    message = f"is of {name} {FACTS[name]}, not another: name a new folder"
    assert message in capsys.readouterr().err
    assert day(out=tmp_path / "new") == ["good", "bad", "last"]


def results(row: Callable[..., dict], tuned: str = "measured") -> dict[str, Any]:
    """One shape measured twice, the second time with torch.compile."""
    quick = [row("small-14", *one) for one in (("eager_nhwc", 240.0), ("fused", 60.0))]
    more = (("eager_nhwc", 250.0), ("compiled", 132.0), ("fused", 66.0))
    compiled = [row("small-14", *one) for one in more]
    made = compiled[: None if tuned == "measured" else 2]
    steps = {
        "small": {"status": "measured", "result": {"ceilings": CEILINGS, "rows": quick}},
        "network": {"status": "measured", "result": {"training": {"speedup": 1.3}}},
        "bad": {"status": "failed", "reason": "ended with 1; none"},
        "compiled-small-14": {"status": tuned, "result": {"ceilings": CEILINGS, "rows": made}},
    }
    return {"environment": FACTS, "steps": steps}


def test_ratios_are_of_one_run(row) -> None:
    rows = gpu_day.rows_of(results(row)["steps"])
    assert [one["gpu_us"] for one in rows] == [250.0, 132.0, 66.0]
    rows = gpu_day.rows_of(results(row, tuned="failed")["steps"])  # it was stopped in between
    assert [one["gpu_us"] for one in rows] == [240.0, 60.0]


def test_report(tmp_path: Path, row, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_day.conclude(results(row), tmp_path, "a command")
    page, printed = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    assert printed.startswith(page) and "`a command`: gpu a GPU, commit abc" in page
    assert "ceilings measured on a GPU: copy 4.00 TB/s, products bf16 800 TFLOP/s" in page
    lines = [" ".join(line.replace("|", " ").split()) for line in page.splitlines()]
    assert "small-14 [128, 384, 14, 14] 250.0 132.0 66.0 30.0 45% 2.00x (compiled)" in lines
    assert "small-14 [128, 384, 14, 14] 50.0 50.0 50.0" in lines  # of the host
    assert '- network: {"training": {"speedup": 1.3}}' in page
    assert "- bad: failed: ended with 1; none" in page  # what is missing is told
    names = ("report.md", "share_of_floor.png")
    assert printed.splitlines()[-1] == f"written: {' '.join(str(tmp_path / n) for n in names)}"
    shutil.rmtree(tmp_path)
    gpu_day.conclude({"environment": FACTS, "steps": {}}, tmp_path, "a command")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]

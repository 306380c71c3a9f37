"""Results are written at once, finished ones not repeated, and no failure stops the others."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.recorder import Context, DeviceLostError, Measurement, Recorder, SkippedError


def _context(seconds: float = 60.0) -> Context:
    return Context(deadline=time.monotonic() + seconds)


def _measurement(name: str, outcome: object, calls: list[str]) -> Measurement:
    def run(_: Context) -> dict:
        calls.append(name)
        if isinstance(outcome, Exception):
            raise outcome
        return {"value": outcome}

    return Measurement(name, run, needs_gpu=False)


def test_one_failure_does_not_stop_the_others_and_only_unmeasured_ones_run_again(
    tmp_path: Path,
) -> None:
    calls: list[str] = []
    measurements = [
        _measurement("good", 1, calls),
        _measurement("bad", RuntimeError("no such kernel\nand more"), calls),
        _measurement("absent", SkippedError("there is no ncu"), calls),
        _measurement("last", 2, calls),
    ]
    said: list[str] = []
    assert Recorder(tmp_path).run(measurements, _context(), said.append)
    again = Recorder(tmp_path)  # from the file
    assert {name: entry["status"] for name, entry in again.entries.items()} == {
        "good": "measured",
        "bad": "failed",
        "absent": "skipped",
        "last": "measured",
    }
    assert again.result("last") == {"value": 2} and again.result("bad") is None
    assert again.entries["bad"]["reason"] == "RuntimeError: no such kernel"
    assert again.entries["absent"]["reason"] == "there is no ncu"
    assert any("absent: skipped" in line and "there is no ncu" in line for line in said)
    again.run(measurements, _context(), said.append)
    assert calls == ["good", "bad", "absent", "last", "bad", "absent"]
    again.run([*measurements, _measurement("new", 3, calls)], _context(), said.append)
    assert calls[6:] == ["new", "bad", "absent"]  # what was never tried comes first


def test_each_result_is_on_disk_before_the_next_one_starts(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)

    def look(_: Context) -> dict:
        written = json.loads(recorder.path.read_text())["measurements"]
        return {"seen": {name: entry["status"] for name, entry in written.items()}}

    first = Measurement("first", lambda _: {}, needs_gpu=False)
    recorder.run([first, Measurement("second", look, needs_gpu=False)], _context(), lambda _: None)
    # the second's own entry stands in case the process dies
    assert recorder.result("second") == {"seen": {"first": "measured", "second": "unfinished"}}


def test_nothing_is_started_when_time_is_up(tmp_path: Path) -> None:
    calls: list[str] = []
    recorder = Recorder(tmp_path)
    assert not recorder.run([_measurement("late", 1, calls)], _context(0.0), lambda _: None)
    assert calls == [] and recorder.entries == {}


def test_a_measurement_is_stopped_when_the_budget_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.recorder.LEAST_SECONDS", 0.0)

    def endless(_: Context) -> dict:
        while True:
            time.sleep(0.01)

    recorder = Recorder(tmp_path)
    recorder.run([Measurement("endless", endless, needs_gpu=False)], _context(0.2), lambda _: None)
    assert recorder.entries["endless"]["status"] == "unfinished"


def test_without_a_gpu_the_reason_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recorder = Recorder(tmp_path)
    recorder.run([Measurement("kernel", lambda _: {})], _context(), lambda _: None)
    assert recorder.entries["kernel"]["status"] == "skipped"
    assert "needs an NVIDIA GPU" in recorder.entries["kernel"]["reason"]


def test_a_lost_device_ends_the_process_but_not_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    usable = iter([True, False, True])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.recorder.device_usable", lambda: next(usable))
    monkeypatch.setattr("benchmarks.recorder.environment.describe", dict)
    measurements = [
        _measurement("first", 1, calls),
        _measurement("bad", RuntimeError("illegal memory access"), calls),
        _measurement("last", 2, calls),
    ]
    with pytest.raises(DeviceLostError, match="bad"):
        Recorder(tmp_path).run(measurements, _context(), lambda _: None)
    again = Recorder(tmp_path)
    assert again.run(measurements, _context(), lambda _: None, retry=False)
    assert calls == ["first", "bad", "last"]
    assert again.entries["bad"]["reason"] == "RuntimeError: illegal memory access"

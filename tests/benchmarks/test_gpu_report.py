"""The report from invented results, and a rehearsal of the whole command without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.recorder import DeviceLostError
from benchmarks.shapes import STAGES


def test_every_measurement_has_a_name_of_its_own_and_every_stage_all_variants() -> None:
    names = [m.name for m in (*gpu_report.part_1(), *gpu_report.part_2())]
    assert len(set(names)) == len(names)
    for shape in STAGES:
        for variant in ("bf16 channels_last", "fp16 channels_last", "tf32 channels_last"):
            assert f"{shape.name} {variant} inference fwd+bwd" in names
        assert f"{shape.name} bf16 nchw inference fwd+bwd" in names
        assert f"compiled {shape.name} bf16 channels_last fwd+bwd" in names


def test_rows_measured_in_two_parts_are_compared(tmp_path: Path, write_results) -> None:
    rows = gpu_report.all_rows(write_results(tmp_path))
    found = {(row["shape"], row["provider"]): row for row in rows}
    assert len(rows) == 4 and found["small-14", "fused"]["gpu_us"] == 60.0
    assert found["small-14", "fused"]["over_best_torch"] == pytest.approx(2.0)
    assert found["small-14", "fused"]["speedup_over"]["eager_nhwc"] == pytest.approx(4.0)


def test_conclusion(tmp_path: Path, write_results, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_report.conclude(write_results(tmp_path, ("abc", "def")), tmp_path, "a command")
    printed = capsys.readouterr().out
    assert "MEASURED AT DIFFERENT COMMITS: abc, def" in printed
    assert 'host time: {"fused": {"inference": 20.0}, "empty_function": 4.0}' in printed
    assert printed.index("of floor") < printed.index("forward, share of floor")
    (host,) = (line for line in printed.splitlines() if line.startswith("host time of a forward"))
    assert host.split()[-3:] == ["16", "us", "pass"]
    assert (tmp_path / "share_of_floor.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.md").read_text()
    assert "| forward, share of floor: geometric mean | >= 42% | 50% | pass | 1 of 12" in page
    assert "Measured by `a command`" in page and "| small-14 [128, 384, 14, 14] | 30.0 |" in page
    assert "growth-14" not in page  # the means of the page are those of the stages


def test_rehearsal_skips_everything_with_the_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--out", str(tmp_path / "out")]
    child = subprocess.run(
        command,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert "skipped: ceilings: an NVIDIA GPU is needed" in child.stdout
    assert "NOT performance results" in child.stdout and "nothing to plot" in child.stdout
    entries = json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]
    assert {entry["status"] for entry in entries.values()} == {"skipped"}
    assert len(entries) == len(gpu_report.part_1()) + len(gpu_report.part_2())


def test_another_process_goes_on_when_the_device_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def run(*_, retry: bool) -> bool:
        assert retry
        raise DeviceLostError("tiny-7")

    monkeypatch.setattr(gpu_report.Recorder, "run", run)
    monkeypatch.setattr(gpu_report, "conclude", lambda *_: None)
    monkeypatch.setattr(gpu_report, "measure_ceilings", lambda: None)
    monkeypatch.setattr(gpu_report, "describe", lambda _: "invented")
    monkeypatch.setattr(gpu_report.os, "execv", lambda _, command: started.append(command))
    arguments = ["gpu_report", "--out", str(tmp_path), "--part", "1", "--minutes", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu_report.main()
    (command,) = started
    assert command[1:7] == ["-m", "benchmarks.gpu_report", "--out", str(tmp_path), "--part", "1"]
    assert command[7] == "--minutes" and 1.9 < float(command[8]) <= 2.0
    assert command[9:] == ["--no-retry"]

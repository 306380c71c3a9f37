"""The report from invented results, and a rehearsal of the whole command without a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_day
from benchmarks.recorder import Context, DeviceLostError, Measurement, Recorder
from benchmarks.report import NOTHING
from benchmarks.shapes import STAGES


def test_every_measurement_has_a_name_of_its_own_and_every_stage_all_variants() -> None:
    names = [m.name for m in gpu_day.measurements()]
    assert len(set(names)) == len(names)
    for shape in STAGES:
        for variant in ("bf16 channels_last", "fp16 channels_last", "tf32 channels_last"):
            assert f"{shape.name} {variant} inference fwd+bwd" in names
        assert f"{shape.name} bf16 nchw inference fwd+bwd" in names
        assert f"compiled {shape.name} bf16 channels_last fwd+bwd" in names


def test_the_most_telling_comes_first() -> None:
    names = [m.name for m in gpu_day.measurements()]
    order = [
        "tests on the GPU",
        "chunks small-14",
        "small-14 bf16 channels_last inference fwd+bwd",
        "products alone",
        "DRAM bytes small-28",
        "host time",
        "graph replay",
        "network",
        "small-14 tf32 channels_last inference fwd+bwd",
        "compiled small-14 bf16 channels_last inference",
    ]
    assert order == sorted(order, key=names.index)


def test_rows_measured_in_two_parts_are_compared(tmp_path: Path, write_results) -> None:
    rows = gpu_day.all_rows(write_results(tmp_path))
    found = {(row["shape"], row["provider"]): row for row in rows}
    assert len(rows) == 4 and found["small-14", "fused"]["gpu_us"] == 60.0
    assert found["small-14", "fused"]["over_best_torch"] == pytest.approx(2.0)
    assert found["small-14", "fused"]["speedup_over"]["eager_nhwc"] == pytest.approx(4.0)


def test_conclusion(tmp_path: Path, write_results, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_day.conclude(write_results(tmp_path, ("abc", "def")), tmp_path, "a command")
    printed = capsys.readouterr().out
    page = (tmp_path / "report.md").read_text()
    assert printed.startswith(page) and "`a command`: commit abc" in page
    assert "MEASURED AT DIFFERENT COMMITS: abc, def" in page
    assert '- host time: {"fused": {"inference": 20.0}, "empty_function": 4.0}' in page
    assert "- bad: failed: RuntimeError: none" in page  # what is missing is told
    lines = [" ".join(line.replace("|", " ").split()) for line in page.splitlines()]
    (host,) = (line for line in lines if line.startswith("host time of a forward"))
    assert host.endswith("<= 30 us 16 us pass")
    assert any(
        line.startswith("forward, share of floor: geometric mean >= 42% 50% pass 1 of 12")
        for line in lines
    )
    assert "small-14 [128, 384, 14, 14] 240.0 120.0 60.0 30.0 50% 2.00x (compiled)" in lines
    # the means are those of the stages: what is no stage has a table after theirs
    assert lines.index("geometric mean, worst 50%, 50% 2.00x, 2.00x") < next(
        index for index, line in enumerate(lines) if line.startswith("growth-14 ")
    )
    assert "small-14 [128, 384, 14, 14] 9.0 8.0 7.0 8.0 9.0" in lines  # by chunk size
    assert page.count("by the size of a chunk") == 2
    assert (tmp_path / "share_of_floor.png").read_bytes().startswith(b"\x89PNG")
    written = printed.splitlines()[-1].split()
    names = ("readme.md", "report.md", "results.json", "share_of_floor.png")
    assert written == ["written:", *(str(tmp_path / name) for name in names)]


def test_text_for_the_readme(tmp_path: Path, write_results) -> None:
    gpu_day.conclude(write_results(tmp_path), tmp_path, "a command")
    readme = (tmp_path / "readme.md").read_text()
    assert readme.startswith(
        "Measured by `make gpu-day`: gpu invented, commit abc; ceilings measured on invented"
    )
    lines = [" ".join(line.replace("|", " ").split()) for line in readme.splitlines()]
    assert "small-14 [128, 384, 14, 14] 240.0 120.0 60.0 30.0 50% 2.00x (compiled)" in lines
    assert "geometric mean, worst 50%, 50% 2.00x, 2.00x" in lines
    assert any(line.startswith("forward over best torch: worst >= 1.10x 2.00x") for line in lines)
    assert "growth-14" not in readme and "chunk" not in readme


def test_without_matplotlib_everything_else_is_written(
    tmp_path: Path,
    write_results,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    gpu_day.conclude(write_results(tmp_path), tmp_path, "a command")
    assert "no picture: import of matplotlib halted" in capsys.readouterr().out
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"readme.md", "report.md", "results.json"}


def test_rehearsal_skips_everything_with_the_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--out", str(tmp_path / "out")]
    child = subprocess.run(
        command,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert "skipped: ceilings: an NVIDIA GPU is needed" in child.stdout
    assert "NOT performance results" in child.stdout
    assert not (tmp_path / "out" / "share_of_floor.png").exists()
    assert (tmp_path / "out" / "readme.md").read_text() == f"{NOTHING}\n"
    entries = json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]
    assert {entry["status"] for entry in entries.values()} == {"skipped"}
    assert len(entries) == len(gpu_day.measurements())


def test_only_some_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        gpu_day.Recorder, "run", lambda _, wanted, *__, **___: seen.append([m.name for m in wanted])
    )
    monkeypatch.setattr(gpu_day, "conclude", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(tmp_path), "--only", "^network"])
    gpu_day.main()
    assert seen == [["network", "network compiled"]]
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(tmp_path), "--only", "net("])
    with pytest.raises(SystemExit, match="2"):
        gpu_day.main()
    assert "--only: expected a pattern, got 'net('" in capsys.readouterr().err


def test_what_is_left_is_told(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    two = [Measurement(name, lambda _: {}, needs_gpu=False, seconds=90) for name in "ab"]
    left = gpu_day.plan(two, recorder)
    assert left == "2 of 2 measurements are left: at most 3 minutes"
    recorder.run(two[:1], Context(time.monotonic() + 60), lambda _: None)
    assert gpu_day.plan(two, recorder).startswith("1 of 2 measurements are left")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_minutes_that_cannot_be(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(tmp_path), f"--minutes={value}"])
    with pytest.raises(SystemExit, match="2"):
        gpu_day.main()
    assert f"a number of minutes above 0, got '{value}'" in capsys.readouterr().err


def test_a_call_ends_within_ten_minutes_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs last may take as long as a child needs to end, and the conclusion a while."""
    seen = []
    monkeypatch.setattr(
        gpu_day.Recorder, "run", lambda _, __, context, *___, **____: seen.append(context)
    )
    monkeypatch.setattr(gpu_day, "conclude", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(tmp_path)])
    gpu_day.main()
    assert 8.4 * 60 < seen[0].remaining() <= 8.5 * 60


def test_folders_with_other_things_in_them_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(gpu_day, "measure_ceilings")  # so that measuring would fail
    (tmp_path / "mine").write_text("x")
    for out, message in (
        (tmp_path / "mine", "expected a folder, got the file"),
        (tmp_path, "with other things in it"),
        (tmp_path / "mine" / "below", "cannot be written: Not a directory"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(out)])
        with pytest.raises(SystemExit, match="2"):
            gpu_day.main()
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert gpu_day.report_folder(str(tmp_path / "a" / "new")).is_dir()


def test_another_process_goes_on_when_the_device_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def run(*_, retry: bool) -> bool:
        assert retry
        raise DeviceLostError("tiny-7")

    monkeypatch.setattr(gpu_day.Recorder, "run", run)
    monkeypatch.setattr(gpu_day, "conclude", lambda *_: None)
    monkeypatch.setattr(gpu_day, "measure_ceilings", lambda: None)
    monkeypatch.setattr(gpu_day.os, "execv", lambda _, command: started.append(command))
    arguments = ["gpu_day", "--out", str(tmp_path), "--minutes", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu_day.main()
    monkeypatch.setattr(gpu_day.Context, "remaining", lambda _: -3.0)
    gpu_day.main()
    command, too_late = started
    assert gpu_day.minutes(too_late[6]) < 0.01  # time to write down what there is
    assert command[1:5] == ["-m", "benchmarks.gpu_day", "--out", str(tmp_path)]
    assert command[5] == "--minutes" and 1.9 < float(command[6]) <= 2.0
    assert command[7:] == ["--no-retry"]

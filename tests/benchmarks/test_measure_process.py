"""What is read out of other programs' output, and what happens when they fail."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import measure_process, targets
from benchmarks.measure_process import (
    ChildTimeoutError,
    compile_kernels,
    dram_bytes,
    first_call,
    gpu_tests,
    memory_checker,
    read_junit,
    read_ncu,
    run_child,
)
from benchmarks.recorder import Context, Measurement, Recorder, SkippedError, details
from benchmarks.shapes import BY_NAME, STAGES
from benchmarks.standalone import PROFILED_CALLS

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_mix" name="test_good"/>
<testcase classname="tests.test_mix" name="test_bad"><failure message="1 != 2&#10;more"/></testcase>
<testcase classname="tests.test_mix" name="test_away"><skipped message="two GPUs"/></testcase>
</testsuite></testsuites>"""

NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","mix_kernel","dram__bytes_read.sum","byte","4,000"
"0","mix_kernel","dram__bytes_write.sum","byte","2,400"
"1","mix_kernel","dram__bytes_read.sum","byte","4,000"
"1","mix_kernel","dram__bytes_write.sum","byte","1,600"
==PROF== Disconnected
"""


def _context() -> Context:
    return Context(deadline=time.monotonic() + 60)


def _answer(stdout: str = "", stderr: str = "", status: int = 0):
    def run(command, *_, **__) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, status, stdout, stderr)

    return run


def test_junit() -> None:
    assert read_junit(JUNIT) == {
        "passed": 1,
        "skipped": 1,
        "failures": {"tests.test_mix::test_bad": "1 != 2"},
        "skips": {"tests.test_mix::test_away": "two GPUs"},
    }


def test_ncu_counters_per_call() -> None:
    found = read_ncu(NCU)
    assert found == {
        "read": 8000 / PROFILED_CALLS,
        "written": 4000 / PROFILED_CALLS,
        "kernels_per_call": 2 / PROFILED_CALLS,
    }
    with pytest.raises(RuntimeError, match="no DRAM counters"):
        read_ncu("==PROF== nothing")


def test_without_ncu_it_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_process.shutil, "which", lambda _: None)
    with pytest.raises(SkippedError, match="not on the PATH"):
        dram_bytes(BY_NAME["small-56"]).run(_context())


def test_ncu_over_the_bytes_of_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_process.shutil, "which", lambda _: "/bin/ncu")
    monkeypatch.setattr(measure_process, "run_child", _answer(NCU))
    shape = BY_NAME["cifar-4"]
    found = dram_bytes(shape).run(_context())
    weights = 2 * (4 * 4 + 4) + 128 * 3 * 128 + 128
    assert found["ideal"] == 2 * (2 * 128 * 128 * 16 + weights)
    assert found["over_ideal"] == pytest.approx(12000 / PROFILED_CALLS / found["ideal"])
    failed = _answer("==ERROR== ERR_NVGPUCTRPERM\n", status=1)
    monkeypatch.setattr(measure_process, "run_child", failed)
    with pytest.raises(SkippedError, match="ncu ended with 1: ==ERROR== ERR_NVGPUCTRPERM"):
        dram_bytes(shape).run(_context())


def test_a_child_that_takes_too_long_is_stopped() -> None:
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    with pytest.raises(RuntimeError, match=r"took over 1 s; printed last: .*begun"):
        run_child(command, 1.0)


def test_every_stage_is_compiled_and_failures_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command, seconds, _):
        asked.append(command[-1])
        assert seconds <= 60
        status = int(command[-1] == "tiny-7")
        return subprocess.CompletedProcess(command, status, "", "no such tile")

    monkeypatch.setattr(measure_process, "run_child", run)
    assert compile_kernels(_context()) == {"failures": {"tiny-7": "ended with 1: no such tile"}}
    assert sorted(asked) == sorted(shape.name for shape in STAGES)


def test_first_call_is_cold_then_warm_in_one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []

    def run(command, seconds, extra_env):
        caches.append(extra_env["TRITON_CACHE_DIR"])
        return subprocess.CompletedProcess(
            command, 0, f'log\n{{"first forward": {len(caches)}}}', ""
        )

    monkeypatch.setattr(measure_process, "run_child", run)
    found = first_call(_context())
    assert found == {"cold": {"first forward": 1}, "warm": {"first forward": 2}}
    assert caches[0] == caches[1]
    monkeypatch.setattr(measure_process, "run_child", _answer(stderr="out of memory", status=1))
    with pytest.raises(RuntimeError, match="ended with 1: out of memory"):
        first_call(_context())


def test_tests_that_leave_no_report_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_process, "run_child", _answer("no module", status=4))
    with pytest.raises(RuntimeError, match="pytest ended with 4: no module"):
        gpu_tests(_context())


def test_the_memory_checker_tells_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_process.shutil, "which", lambda _: "/bin/compute-sanitizer")

    def verdict(stdout: str, status: int) -> dict:
        monkeypatch.setattr(measure_process, "run_child", _answer(stdout, status=status))
        return memory_checker(_context())

    head = "========= COMPUTE-SANITIZER\n"
    assert verdict(f"{head}========= ERROR SUMMARY: 0 errors\n", 0) == {"failures": {}}
    found = f"{head}========= Invalid read of size 2\n========= ERROR SUMMARY: 1 error\n"
    for status in (0, 1, 9):  # a program that dies of what was found ends with its own
        assert "Invalid read of size 2" in verdict(found, status)["failures"]["compute-sanitizer"]
    with pytest.raises(SkippedError, match=r"ended with 1, no summary: .*Device not supported"):
        verdict("========= Device not supported\n", 1)
    with pytest.raises(RuntimeError, match="no errors found, but the program ended with 1"):
        verdict(f"{head}========= ERROR SUMMARY: 0 errors\n", 1)
    monkeypatch.setattr(measure_process.shutil, "which", lambda _: None)
    with pytest.raises(SkippedError, match="not on the PATH"):
        memory_checker(_context())


def _pytest(monkeypatch: pytest.MonkeyPatch, reports: dict[str, str]) -> list[list[str]]:
    """A pytest that writes the given report for each marker expression; its commands."""
    commands = []

    def run(command, seconds) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        report = next(a.partition("=")[2] for a in command if a.startswith("--junitxml="))
        Path(report).write_text(reports[command[command.index("-m", 2) + 1]])
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(measure_process, "run_child", run)
    return commands


def test_the_forward_is_tested_first_and_large_tests_alone_and_a_skip_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = """<testsuite><testcase classname="g" name="test_big">
    <skipped message="needs 30 GiB"/></testcase></testsuite>"""
    good = '<testsuite><testcase classname="f" name="test_forward"/></testsuite>'
    reports = {"not large": good, "gpu and large": large, "gpu and not large": JUNIT}
    commands = _pytest(monkeypatch, reports)
    found = gpu_tests(_context())
    first, second, third = commands
    assert "tests/smlp_kernels/test_mix.py" in first and first[first.index("-n") + 1] == "8"
    assert "gpu and large" in second and "tests" in second and "-n" not in second
    assert "gpu and not large" in third and third[third.index("-n") + 1] == "8"
    assert "--deselect=tests/smlp_kernels/test_mix.py" in third  # they ran before
    assert found == {
        "passed": 2,
        "skipped": 2,
        "failures": {"tests.test_mix::test_bad": "1 != 2"},
        "skips": {"g::test_big": "needs 30 GiB", "tests.test_mix::test_away": "two GPUs"},
    }
    assert list(details({"result": found})) == [
        "tests.test_mix::test_bad: 1 != 2",
        "g::test_big: SKIPPED: needs 30 GiB",
        "tests.test_mix::test_away: SKIPPED: two GPUs",
    ]
    (verdict,) = (
        one
        for one in targets.verdicts([], lambda name: found if "tests" in name else None)
        if "tests" in one.name
    )
    assert verdict.remark == "2 passed, 2 skipped; NOT RUN: g::test_big, tests.test_mix::test_away"


def test_the_tests_marked_large_are_those_beyond_31_bits() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu and large"]
    child = run_child([*command, "tests/smlp_kernels/test_gpu.py"], 60)
    names = [line.partition("::")[2] for line in child.stdout.splitlines() if "::" in line]
    assert len(names) == 3 and all("more_than_two_to_the_31_elements" in name for name in names)


def test_a_test_file_that_cannot_be_imported_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "test_broken.py").write_text("import a_package_that_is_missing\n")
    (tmp_path / "test_good.py").write_text(
        "import pytest\npytestmark = [pytest.mark.gpu, pytest.mark.large]\ndef test(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  large\n")
    found = measure_process._run_tests(_context(), "gpu and large", 0, [str(tmp_path)])
    assert found["passed"] == 1
    (message,) = found["failures"].values()
    assert "collection failure" in message


def test_tests_that_are_cut_off_tell_how_far_they_came(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    printed = "[gw0] [ 1%] PASSED tests/a.py::b\n[gw1] PASSED tests/a.py::c\ntests/d.py::e FAILED"

    def run(command, seconds):
        assert seconds < 20
        raise ChildTimeoutError(command, seconds, printed)

    monkeypatch.setattr(measure_process, "run_child", run)
    recorder = Recorder(tmp_path)
    tests = Measurement("tests on the GPU", gpu_tests, needs_gpu=False, seconds=20)
    said: list[str] = []
    recorder.run([tests], _context(), said.append)
    entry = recorder.entries["tests on the GPU"]
    assert entry["status"] == "unfinished" and "took too long" in entry["reason"]
    assert entry["so_far"]["cut off"] == {"not large": {"PASSED": 2, "FAILED": 1}}
    assert any('"PASSED": 2' in line for line in said)

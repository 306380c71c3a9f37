"""What is read out of other programs' output, and what happens when they fail or take too long."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import steps
from benchmarks.steps import (
    Step,
    checker,
    dram,
    dram_bytes,
    limits,
    objects,
    outcomes,
    problems,
    tables,
    verdict,
)

NOWHERE = Path("nowhere")
NCU = """==PROF== Connected to process 1
{"calls": 4, "ideal": 1000}
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","axes_kernel","dram__bytes_read.sum","byte","4,000"
"0","axes_kernel","dram__bytes_write.sum","byte","2,400"
"1","axes_kernel","dram__bytes_read.sum","byte","4,000"
"1","axes_kernel","dram__bytes_write.sum","byte","1,600"
==PROF== Disconnected
"""


def test_json_among_other_lines() -> None:
    assert objects('a warning\n{"a": 1}\nmore\n{"b": 2}\n', NOWHERE) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="there is no JSON"):
        objects("Traceback", NOWHERE)


def test_rows_are_those_with_a_time(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    timed, other = {"provider": "fused", "gpu_us": 1.0}, {"provider": "eager_nhwc"}
    benchmarks = [{"extra_info": timed}, {"extra_info": other}]
    file.write_text(json.dumps({"benchmarks": benchmarks, "ceilings": {"device": "invented"}}))
    assert steps.rows("", file) == {"ceilings": {"device": "invented"}, "rows": [timed]}
    file.write_text(json.dumps({"benchmarks": benchmarks[1:], "ceilings": None}))
    with pytest.raises(ValueError, match="nothing was timed"):
        steps.rows("", file)


def test_outcomes_of_tests() -> None:
    printed = "SKIPPED [1] a.py:3: needs 30 GiB\n== 1 failed, 12 passed, 1 skipped in 3.2s ==\n"
    skips = ["SKIPPED [1] a.py:3: needs 30 GiB"]
    expected = {"failed": 1, "passed": 12, "skipped": 1, "skips": skips}
    assert outcomes(printed, NOWHERE) == expected
    with pytest.raises(ValueError, match=r"no test passed; SKIPPED \[1\] a.py:3: needs 30 GiB"):
        outcomes(printed.replace("1 failed, 12 passed, ", ""), NOWHERE)


@pytest.mark.parametrize("kind", ["ERROR SUMMARY: {} errors", "RACECHECK SUMMARY: {} hazards"])
def test_the_summary_of_a_checker_decides(kind: str) -> None:
    assert verdict(f"========= {kind.format(0)}", NOWHERE) == {"errors": 0}
    for printed in (f"========= {kind.format(3)}", "========= Device not supported"):
        with pytest.raises(ValueError, match="expected a summary of 0 errors"):
            verdict(printed, NOWHERE)


def test_bytes_of_a_call() -> None:
    found = dram_bytes(NCU, NOWHERE)
    assert found == {"read": 2000, "written": 1000, "over_ideal": 3.0}
    with pytest.raises(ValueError, match="no DRAM counters"):
        dram_bytes('{"calls": 4, "ideal": 1000}\n==PROF== nothing', NOWHERE)


def test_tables_of_a_training_step() -> None:
    assert limits("small-14").command[-3:] == ["benchmarks.standalone", "training", "small-14"]
    assert tables("  Section: A\n  Section: B\n", NOWHERE) == {"tables": 2}
    with pytest.raises(ValueError, match="no tables in what ncu printed"):
        tables("==PROF== nothing", NOWHERE)


def test_problems_are_lines_that_say_what_went_wrong() -> None:
    printed = "a.py::b PASSED\nFAILED a.py::c - 1 != 2\n========= Invalid read of size 2\nend\n"
    assert problems(printed) == ["FAILED a.py::c - 1 != 2", "========= Invalid read of size 2"]
    assert problems("one\n==ERROR== ERR_NVGPUCTRPERM\n") == ["==ERROR== ERR_NVGPUCTRPERM"]
    assert problems("Traceback\nRuntimeError: why\n\n") == ["RuntimeError: why"]
    assert problems("") == []


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """The name of a module with this text, for ``python -m``."""
    (folder / "a_job.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "a_job"


def test_results_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, "print('{\"a\": 1}')")
    entry = Step("one", (name, steps.JSON)).run(tmp_path, 60)
    assert entry["status"] == "measured" and entry["result"] == {"a": 1}
    assert "reason" not in entry and entry["command"].endswith("-m a_job '{json}'")
    assert (tmp_path / "one.txt").read_text() == '{"a": 1}\n'


def test_a_step_that_fails_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "print('{\"a\": 1}'); raise RuntimeError('no such kernel')"
    entry = Step("one", (module(tmp_path, monkeypatch, text),)).run(tmp_path, 60)
    assert entry["status"] == "failed" and entry["result"] == {"a": 1}
    assert entry["reason"] == "ended with 1; RuntimeError: no such kernel"


def test_a_step_without_results_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, "print('done')")
    entry = Step("one", (name,)).run(tmp_path, 60)
    assert entry["status"] == "failed" and "there is no JSON" in entry["reason"]
    (tmp_path / "two.json").write_text("of an earlier call")
    entry = Step("two", (name,), read=steps.rows).run(tmp_path, 60)
    assert "FileNotFoundError" in entry["reason"] and "result" not in entry


def running(status: Path) -> bool:
    """Whether a process runs; an orphan that is dead may wait to be reaped."""
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_step_that_takes_too_long_is_interrupted_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "GRACE_SECONDS", 5.0)
    text = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
print('{"a": 1}', flush=True)
try:
    time.sleep(99)
except KeyboardInterrupt:
    print('{"child": %d}' % child.pid, flush=True)
    time.sleep(99)
"""
    start = time.monotonic()
    entry = Step("one", (module(tmp_path, monkeypatch, text),)).run(tmp_path, 5)
    assert entry["status"] == "failed" and entry["reason"].startswith("stopped after 5 s")
    assert entry["result"]["a"] == 1 and time.monotonic() - start < 60
    status = Path(f"/proc/{entry['result']['child']}/stat")
    while running(status) and time.monotonic() - start < 60:  # it dies a little after the signal
        time.sleep(0.01)
    assert not running(status)


def test_pytest_reports_what_it_has_when_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures are told, and benchmarks that were made written down."""
    (tmp_path / "test_slow.py").write_text(
        "import time\n"
        "def test_first(benchmark):\n"
        "    benchmark.extra_info['gpu_us'] = 1.0\n"
        "    benchmark.pedantic(lambda: None)\n"
        "def test_second(): assert 1 == 2, 'so it is'\n"
        "def test_third(): time.sleep(99)\n"
    )
    (tmp_path / "conftest.py").write_text(
        "def pytest_benchmark_update_json(output_json): output_json['ceilings'] = None\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\n")
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):  # or no benchmark is made
        monkeypatch.delenv(name, raising=False)
    arguments = ("pytest", str(tmp_path), "-p", "no:cacheprovider")
    options = (
        f"--benchmark-json={steps.JSON}",
        f"--rootdir={tmp_path}",
        f"-c{tmp_path}/pytest.ini",
    )
    wide = steps.tests("tests", "gpu").under
    entry = Step("one", (*arguments, *options), read=steps.rows, under=wide).run(tmp_path, 12)
    assert entry["reason"].startswith("stopped after 12 s; FAILED ")
    assert "so it is" in entry["reason"]
    assert entry["result"]["rows"] == [{"gpu_us": 1.0}]


def test_a_program_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert dram("small-56").run(tmp_path, 9)["reason"] == "ncu is not on the PATH"
    reason = checker("memcheck", "benchmarks.hopper", "once").run(tmp_path, 9)["reason"]
    assert "compute-sanitizer" in reason and "No such file" in reason


def test_a_test_file_that_cannot_be_imported_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import a_package_that_is_missing\n")
    (tmp_path / "test_good.py").write_text(
        "import pytest\npytestmark = [pytest.mark.gpu, pytest.mark.large]\ndef test(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\nmarkers =\n  gpu\n  large\n")
    step = steps.tests("large", "gpu and large", str(tmp_path), parallel=False)
    entry = step.run(tmp_path, 60)
    assert entry["result"]["passed"] == 1 and entry["status"] == "failed"
    assert "ERROR " in entry["reason"] and "test_broken.py" in entry["reason"]


def test_the_tests_marked_large_are_those_beyond_31_bits(tmp_path: Path) -> None:
    options = ("--collect-only", "-qq", "tests/smlp_kernels/test_gpu.py")
    steps.tests("large", "gpu and large", *options, parallel=False).run(tmp_path, 60)
    lines = (tmp_path / "large.txt").read_text().splitlines()
    names = [line.partition("::")[2] for line in lines if "::" in line]
    assert len(names) == 3 and all("more_than_two_to_the_31_elements" in name for name in names)
    assert sys.executable in steps.tests("a", "gpu").command

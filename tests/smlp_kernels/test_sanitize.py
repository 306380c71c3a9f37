"""benchmarks/sanitize.sh: what it runs, with a stand-in for compute-sanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.shapes import BY_NAME

ROOT = Path(__file__).parents[2]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]


@pytest.fixture
def checker(tmp_path: Path) -> Path:
    """A folder with a compute-sanitizer that notes its arguments and finds something in races.

    Its exit status is 0 all the same, as of a program that handles its error.
    """
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> "$(dirname "$0")/log"\n'
        'case "$*" in\n'
        '*racecheck*) echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)";;\n'
        '*initcheck*) echo "========= Internal error"; exit 1;;\n'
        '*) echo "========= ERROR SUMMARY: 0 errors";;\n'
        "esac\n"
    )
    tool.chmod(0o755)
    return tmp_path


def sanitize(folder: Path | None, *tools: str) -> subprocess.CompletedProcess[str]:
    path = "/usr/bin:/bin" if folder is None else f"{folder}:/usr/bin:/bin"
    environment = os.environ | {"PATH": path, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "sanitize.sh"), *tools]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_tool_runs_and_a_finding_is_a_failure(checker: Path) -> None:
    result = sanitize(checker)
    assert result.returncode == 1
    log = (checker / "log").read_text().splitlines()
    assert [line.split()[2] for line in log] == [
        *("memcheck", *["racecheck"] * 3, *["initcheck"] * 3, "synccheck")
    ]
    for line in log:
        assert line.startswith("1 --tool ") and f"{sys.executable} -m" in line
    named = {line.split()[-1] for line in log if "benchmarks.standalone" in line}
    assert len(named) == 3 and named <= set(BY_NAME)
    for path in (word for line in log for word in line.split() if word.endswith(".py")):
        assert (ROOT / path).exists()


def test_the_summary_decides_not_the_exit_status(checker: Path) -> None:
    found = sanitize(checker, "racecheck")  # which ends with 0
    assert found.returncode == 1 and "2 hazards" in found.stdout
    assert sanitize(checker, "initcheck").returncode == 1  # which says nothing


def test_clean_tools_pass(checker: Path) -> None:
    assert sanitize(checker, "memcheck", "synccheck").returncode == 0
    assert len((checker / "log").read_text().splitlines()) == 2


def test_what_cannot_run_is_said(checker: Path) -> None:
    unknown = sanitize(checker, "leakcheck")
    assert unknown.returncode == 2 and "got leakcheck" in unknown.stderr
    missing = sanitize(None)
    assert missing.returncode == 2 and "compute-sanitizer is not on the PATH" in missing.stderr

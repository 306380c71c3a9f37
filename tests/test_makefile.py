"""What ``make audit`` makes of the answers of pip-audit, which is stood in for here."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FINDS = "echo 'Found 4 known vulnerabilities in 1 package' >&2; exit 1"
PYTHON = """#!/bin/sh
case "$*" in
"-m pip freeze --exclude-editable") {freeze};;
"-m pip_audit "*" -r /dev/stdin") read -r requirement
    case "$requirement" in
    jinja2==2.10) {control};;
    torch==2.13.0) {audit};;
    *) echo "unexpected: $requirement"; exit 9;;
    esac;;
*) echo "unexpected: $*"; exit 9;;
esac
"""


@pytest.mark.parametrize(
    ("commands", "is_well", "said"),
    [
        ({}, True, "No known vulnerabilities found"),
        ({"audit": FINDS}, False, "Found 4 known vulnerabilities in 1 package"),
        (
            {"control": "echo 'No known vulnerabilities found'; echo 'jinja2 not found on PyPI'"},
            False,
            "jinja2 not found on PyPI\nmake audit: expected a service that finds",
        ),
        (
            {"control": "echo 'cannot connect'; exit 1"},
            False,
            "cannot connect\nmake audit: expected",
        ),
        ({"audit": "echo 'cannot connect'; exit 1"}, False, "cannot connect"),
        ({"freeze": "echo torch==2.13.0; exit 1"}, False, "audit] Error 1"),
    ],
    ids=["clean", "vulnerable", "knows nothing", "no network", "network lost", "freeze fails"],
)
def test_audit(commands: dict[str, str], is_well: bool, said: str, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    python = tmp_path / "python"
    usual = {
        "freeze": "echo torch==2.13.0+cpu",
        "control": FINDS,
        "audit": "echo 'No known vulnerabilities found'",
    }
    python.write_text(PYTHON.format(**(usual | commands)))
    python.chmod(0o755)
    make = subprocess.run(
        ["make", "audit", f"PYTHON={python}", "VENV="],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (make.returncode == 0) == is_well, make.stdout
    assert said in make.stdout
    assert "unexpected" not in make.stdout

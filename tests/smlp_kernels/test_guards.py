"""tests/README.md names the test that guards against each known bug: they have to exist."""

import ast
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
README = (FOLDER.parent / "README.md").read_text()
ROWS = [line for line in README.splitlines() if line.startswith("| ") and "---" not in line]
NAMED = sorted(set(re.findall(r"`((?:\w+/)?test_\w+\.py)::(\w+)`", README)))


def functions_of(path: Path) -> set[str]:
    """Names of the test functions of a file, without importing it."""
    nodes = ast.parse(path.read_text()).body
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_named_tests_exist(file: str) -> None:
    path = (FOLDER.parent if "/" in file else FOLDER) / file
    missing = {name for named_in, name in NAMED if named_in == file} - functions_of(path)
    assert not missing, f"tests/README.md names tests that {file} does not have: {missing}"


def test_every_bug_has_its_thread_and_its_guard() -> None:
    bugs = [row.strip("|").split(" | ") for row in ROWS if re.search(r"\w+/[\w-]+#\d+", row)]
    assert len(bugs) == 18
    for bug, reported, guard, where in bugs:
        assert re.search(r"[\w-]+/[\w.-]+#\d+", reported), bug
        assert "test_" in guard or "No test: " in guard, bug
        assert set(re.findall(r"CPU|PTX|AOT|GPU", where)), bug

"""docs/guards.md names the test that guards against each known bug: they have to exist."""

import ast
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PAGE = (FOLDER.parents[1] / "docs" / "guards.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
NAMED = sorted(set(re.findall(r"`((?:\w+/)?test_\w+\.py)::(\w+)`", PAGE)))


def functions_of(path: Path) -> set[str]:
    """Names of the test functions of a file, without importing it."""
    nodes = ast.parse(path.read_text()).body
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_named_tests_exist(file: str) -> None:
    path = (FOLDER.parent if "/" in file else FOLDER) / file
    missing = {name for named_in, name in NAMED if named_in == file} - functions_of(path)
    assert not missing, f"docs/guards.md names tests that {file} does not have: {missing}"


def test_every_bug_has_its_thread_and_its_guard() -> None:
    bugs = [row.strip("|").split(" | ") for row in ROWS if re.search(r"\w+/[\w-]+#\d+", row)]
    assert len(bugs) == 18
    for bug, reported, guard, where in bugs:
        assert re.search(r"[\w-]+/[\w.-]+#\d+", reported), bug
        assert "test_" in guard or "No test: " in guard, bug
        assert set(re.findall(r"CPU|PTX|AOT|GPU", where)), bug


@pytest.mark.parametrize("row", ROWS)
def test_cells_are_short(row: str) -> None:
    """Without the names of tests and threads: an explanation belongs where the test is."""
    for cell in row.strip("| ").split(" | "):
        assert len(re.sub(r"`[^`]*`|[\w.-]+/[\w.-]+#\d+", "", cell)) <= 110, cell

"""Which tests are left out, and that each of them is named with the reason."""

from pathlib import Path

import pytest

from tests.conftest import HAS_GPU

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu(): pass

@pytest.mark.complete
@pytest.mark.parametrize("case", range(3))
def test_of_minutes(case): pass

def test_plain(): pass
"""


@pytest.mark.parametrize("complete", [False, True])
def test_what_is_left_out_is_named(pytester: pytest.Pytester, complete: bool) -> None:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess("-ra", *["--complete"] * complete)
    left_out = (0 if HAS_GPU else 1) + (0 if complete else 3)
    result.assert_outcomes(passed=5 - left_out, skipped=left_out)
    if complete:
        result.stdout.no_fnmatch_line("*make test-all*")
    else:
        result.stdout.fnmatch_lines(["SKIPPED [[]3[]] *: left to make test-all*"])

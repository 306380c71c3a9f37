"""The commit that a number was measured at, and what stands in for it without git."""

import subprocess

import pytest

from benchmarks import environment


def test_commit_is_that_of_the_checkout() -> None:
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("this is no git checkout")
    assert head.stdout.startswith(environment.commit().rstrip("+"))


def test_commit_from_the_environment_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: str) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment, "_git", no_git)
    monkeypatch.delenv("SMLP_COMMIT", raising=False)
    assert environment.commit() == "unknown"
    monkeypatch.setenv("SMLP_COMMIT", "abc123")
    assert environment.commit() == "abc123"

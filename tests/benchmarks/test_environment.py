"""The commit that a number was measured at: as the environment says, or else git."""

import subprocess

import pytest

from benchmarks import environment


def test_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMLP_COMMIT", raising=False)
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("this is no git checkout")
    assert head.stdout.startswith(environment.commit().rstrip("+"))


def test_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: str) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment, "_git", no_git)
    monkeypatch.delenv("SMLP_COMMIT", raising=False)
    assert environment.commit() == "unknown"


def test_commit_from_the_environment_comes_before_that_of_git(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The git directory next to copied code may be of another commit."""
    monkeypatch.setattr(environment, "_git", lambda *_: "old000000")
    monkeypatch.setenv("SMLP_COMMIT", "abc123")
    assert environment.commit() == "abc123"
    monkeypatch.setenv("SMLP_COMMIT", "")
    assert environment.commit().startswith("old000000")

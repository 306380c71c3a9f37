"""The commit that a number was measured at: as the environment says, or else git."""

import re
import subprocess
from pathlib import Path

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
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("SMLP_COMMIT", raising=False)
    assert environment.commit() == "unknown"


def test_what_differs_from_the_commit_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A tag does not: a hash is wanted. Nor do files that git was not told of."""
    monkeypatch.delenv("SMLP_COMMIT", raising=False)
    monkeypatch.setattr(environment, "ROOT", tmp_path)

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "a").write_text("1")
    git("init")
    git("add", "a")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    git("-c", "user.name=a", "-c", "user.email=a@b", "tag", "-a", "v1", "-m", "a")
    (tmp_path / "b").write_text("not of git")
    assert re.fullmatch("[0-9a-f]{9}", environment.commit())
    (tmp_path / "a").write_text("2")
    assert re.fullmatch(r"[0-9a-f]{9}\+", environment.commit())


def test_commit_from_the_environment_comes_before_that_of_git(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The git directory next to copied code may be of another commit."""
    monkeypatch.setenv("SMLP_COMMIT", "abc123")
    assert environment.commit() == "abc123"
    monkeypatch.setenv("SMLP_COMMIT", "")
    assert environment.commit() != "abc123"

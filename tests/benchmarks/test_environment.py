"""Facts about the machine, and what stands in for those that cannot be had."""

import subprocess

import pytest
import torch

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


def test_facts_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = environment.describe()
    assert facts["torch"] == torch.__version__ and "gpu" not in facts


def test_nvidia_smi_answers_by_field_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "580.1, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 40, 100.0 W, 700.0 W\n"

    def run(command, **_) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(environment.subprocess, "run", run)
    facts = environment._nvidia_smi()
    assert facts["driver_version"] == "580.1" and facts["power.limit"] == "700.0 W"

    def absent(*_, **__) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(environment.subprocess, "run", absent)
    assert environment._nvidia_smi() == {}

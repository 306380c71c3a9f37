"""Facts about the machine, and what stands in for those that cannot be had."""

import subprocess

import pytest
import torch

from smlp import machine


def test_facts_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = machine.describe()
    assert facts["torch"] == torch.__version__ and "gpu" not in facts
    assert machine.in_words(facts, ("torch", "gpu")) == f"torch {torch.__version__}"


def test_a_package_that_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package"))
    facts = machine.describe()
    assert facts["numpy"] is not None and facts["no-such-package"] is None
    assert "no-such-package" not in machine.in_words(facts)


def test_nvidia_smi_answers_by_field_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "580.1, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 40, 100.0 W, 700.0 W\n"

    def run(command, **_) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi" and command[-1] == "--id=1"
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(machine.subprocess, "run", run)
    facts = machine._nvidia_smi(1)
    assert facts["driver_version"] == "580.1" and facts["power.limit"] == "700.0 W"

    def absent(*_, **__) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine._nvidia_smi(0) == {}

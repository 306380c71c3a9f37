"""Facts about the machine, and what stands in for those that cannot be had."""

import subprocess
from types import SimpleNamespace

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
    facts = machine._nvidia_smi("1")
    assert facts["driver_version"] == "580.1" and facts["power.limit"] == "700.0 W"

    def absent(*_, **__) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine._nvidia_smi("0") == {}


@pytest.mark.parametrize("known", [True, False])
def test_nvidia_smi_is_asked_about_the_gpu_that_torch_means(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"name": "", "major": 9, "minor": 0, "multi_processor_count": 132, "uuid": "0a-1b"}
    properties = SimpleNamespace(**facts, L2_cache_size=1, total_memory=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties)
    asked = []

    def smi(gpu: str) -> dict[str, str]:
        asked.append(gpu)
        return {"driver_version": "580.1"} if known or gpu == "0" else {}

    monkeypatch.setattr(machine, "_nvidia_smi", smi)
    assert machine.describe()["driver_version"] == "580.1"
    assert asked == (["GPU-0a-1b"] if known else ["GPU-0a-1b", "0"])

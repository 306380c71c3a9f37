"""The environment report says which path a block takes, and refuses what it cannot read."""

import re
import subprocess
import sys

import pytest
import torch

from smlp_kernels import env_report
from tests.conftest import HAS_GPU


def path_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the report says of a block's path, without the environment above it."""
    assert env_report.main(list(arguments)) == 0
    return capsys.readouterr().out.partition("a block ")[2]


def test_versions_are_those_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    env_report.main([])
    lines = dict(re.findall(r"^(\S+) {2,}(.*)$", capsys.readouterr().out, re.M))
    assert lines["torch"] == torch.__version__
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))


def test_kernels_where_they_run(capsys: pytest.CaptureFixture[str]) -> None:
    line = path_line(capsys, "--block", "20x20x32", "--dtype", "fp16")
    where = "on cuda:0" if HAS_GPU else "in Triton's interpreter"
    assert f"runs on the fused kernels {where}" in line
    assert "forward along H: AxisRow(archs=None, forward=True, itemsize=2, positions=32, " in line
    assert "backward along W: AxisRow(archs=None, forward=None, itemsize=2, positions=32, " in line
    longer = path_line(capsys, "--block", "14x130x32", "--dtype", "fp16")
    assert "forward along W: products of PyTorch" in longer


def test_fallback_and_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "runs on PyTorch: height and width are 300 and 2" in path_line(
        capsys, "--block", "300x2x4", "--dtype", "fp32"
    )
    monkeypatch.setenv("SMLP_KERNELS_DISABLE", "1")
    assert "runs on PyTorch: SMLP_KERNELS_DISABLE=1 is set" in path_line(capsys)


@pytest.mark.parametrize("block", ["56x56", "0x1x1", "axbxc", "1x1x-1"])
def test_bad_block(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        env_report.main(["--block", block])
    message = capsys.readouterr().err
    assert f"argument --block: expected HEIGHTxWIDTHxCHANNELS, got '{block}'" in message


def test_unusable_device_is_an_error_before_anything_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        env_report.main(["--device", "cuda:99"])
    out, err = capsys.readouterr()
    assert not out and "--device: 'cuda:99' cannot be used" in err


def test_as_a_command() -> None:
    command = [sys.executable, "-m", "smlp_kernels.env_report"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"torch                    {torch.__version__}" in result.stdout

"""What ships of the Hopper kernels: it is what the source compiles to, and how it assembles."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from triton import knobs

from smlp_kernels.hopper import OPTIONS
from tools import hopper_ptx

MAX_REGISTERS = 168  # of a thread, with 384 in a block

KERNELS = re.findall(r"(?m)^\.visible \.entry (\w+)\(", hopper_ptx.shipped_ptx())


def test_products_are_what_the_tool_writes() -> None:
    assert hopper_ptx.PRODUCTS.read_text() == hopper_ptx.products()


def test_text_is_what_the_source_compiles_to() -> None:
    if reason := hopper_ptx.missing():
        pytest.skip(f"{reason}: the shipped PTX is not compared with its source")
    compiled = hopper_ptx.compile_ptx(hopper_ptx.KERNELS)
    assert hopper_ptx.shipped_ptx() == compiled, "run python -m tools.hopper_ptx"


def test_another_nvcc_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hopper_ptx.missing() == "there is no nvcc on the PATH"
    (tmp_path / "nvcc").write_text(
        "#!/bin/sh\necho Cuda compilation tools, release 12.9, V12.9.1\n"
    )
    (tmp_path / "nvcc").chmod(0o755)
    assert "nvcc is not of CUDA 13.0: Cuda compilation tools, rel" in str(hopper_ptx.missing())
    with pytest.raises(SystemExit, match="nvcc is not of CUDA 13"):
        hopper_ptx.main()


def test_kernels_are_those_that_plans_name() -> None:
    kinds = [f"{n}{t}" for n in ("200", "248", "256", "strips") for t in ("", "_t")]
    assert sorted(KERNELS) == sorted(f"smlp_{d}_{k}" for d in ("bf16", "fp16") for k in kinds)


def test_a_wheel_carries_the_text() -> None:
    tools = tomllib.loads((hopper_ptx.ROOT / "pyproject.toml").read_text())["tool"]
    patterns = tools["setuptools"]["package-data"]["smlp_kernels"]
    path = hopper_ptx.SHIPPED.relative_to(hopper_ptx.FOLDER.parent)
    assert any(path.match(pattern) for pattern in patterns)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What Triton's ptxas says of each kernel, and of none in particular."""
    folder = tmp_path_factory.mktemp("ptx")
    (folder / "all.ptx").write_text(hopper_ptx.shipped_ptx())
    command = [knobs.nvidia.ptxas.path, "-v", *OPTIONS, "all.ptx", "-o", "all.cubin"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    first, *others = result.stderr.split("Compiling entry function '")
    return {"": first, **dict(text.split("'", 1) for text in others)}


@pytest.mark.parametrize("kernel", KERNELS)
def test_resources(kernel: str, reports: dict[str, str]) -> None:
    """Registers, spills, and products that ptxas would let wait for each other."""
    report = reports[kernel]
    assert re.findall(r"(\d+) bytes (?:stack|spill)", report) == ["0"] * 3
    assert int(re.findall(r"Used (\d+) registers", report)[0]) <= MAX_REGISTERS
    assert "serialized" not in reports[""] + report

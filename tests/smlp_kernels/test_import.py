"""Importing: without a driver, with packages too old or missing, with a cache that is no folder."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from smlp_kernels import _requirements

ROOT = Path(__file__).parents[2]
USE_SMLP = """
import torch
from smlp import SMLPBlock
y = SMLPBlock(2, 3, 4)(torch.zeros(1, 4, 2, 3))
assert y.shape == (1, 4, 2, 3)
"""
IMPORT_KERNELS = """
try:
    import smlp_kernels
except ImportError as error:
    print(error)
else:
    print("imported")
"""


def run(code: str, path: Path | None = None, **environment: str) -> str:
    """What a fresh Python prints, outside of the interpreter of Triton, without a GPU."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    search_path = [str(p) for p in (path, ROOT) if p is not None]
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited
        | {"PYTHONPATH": os.pathsep.join(search_path), "CUDA_VISIBLE_DEVICES": ""}
        | environment,
        capture_output=True,
        text=True,
        cwd=path or ROOT,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_on_a_bare_cpu() -> None:
    code = """
import torch
from smlp_kernels import FusedSMLPBlock, fallback_reason
assert not torch.cuda.is_initialized()
x = torch.zeros(1, 4, 2, 3)
print(FusedSMLPBlock(2, 3, 4)(x).shape, fallback_reason(x))
"""
    expected = "torch.Size([1, 4, 2, 3]) the device is cpu; the kernels need an NVIDIA GPU"
    assert expected in run(code)


@pytest.mark.parametrize("problem", ["3.5.1", "no version", "missing"])
def test_triton_that_cannot_be_used_is_named_and_smlp_works(problem: str, tmp_path: Path) -> None:
    package = tmp_path / "triton"
    package.mkdir()
    source = {
        "3.5.1": "__version__ = '3.5.1'",
        "no version": "",
        "missing": "raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')",
    }[problem]
    (package / "__init__.py").write_text(source)
    expected = {
        "3.5.1": "needs triton >= 3.6, found 3.5.1;",
        "no version": "needs triton >= 3.6, which cannot be imported (module 'triton' has no",
        "missing": "needs triton >= 3.6, which cannot be imported (No module named 'triton');",
    }[problem]
    printed = run(USE_SMLP + IMPORT_KERNELS, tmp_path)
    assert f"smlp_kernels {expected}" in printed
    assert "the package smlp works without it" in printed


def test_torch_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.3+cu130")
    with pytest.raises(ImportError, match=r"needs torch >= 2\.11, found 2\.10\.3\+cu130;"):
        _requirements.require_versions()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.11.0", (2, 11)),
        ("2.13.0+cpu", (2, 13)),
        ("3.6.0.post1", (3, 6)),
        ("2.14.0a0+git1234567", (2, 14)),
        ("2.11rc1", (2, 11)),
    ],
)
def test_release(text: str, expected: tuple[int, int]) -> None:
    assert _requirements.release(text) == expected


def test_minimum_is_the_packages_own() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        match[1]: (int(match[2]), int(match[3]))
        for requirement in project["dependencies"]
        if (match := re.match(r"(\w+)>=(\d+)\.(\d+)", requirement))
    }
    assert {name: declared[name] for name in _requirements.MINIMUM} == _requirements.MINIMUM


def test_cache_folder_that_cannot_be_written_is_replaced() -> None:
    """Compiles, too: what Triton would stop with, it stops with there."""
    code = """
import logging; logging.basicConfig()
from pathlib import Path
import os, smlp_kernels
from tools.aot import compile_call
from tools.aot_report import Case
compile_call(Case(1, 1, 16, "fp32", True, 80).calls()["forward, axes"], 80)
folder = Path(os.environ["TRITON_CACHE_DIR"])
print(len(list(folder.rglob("*.cubin"))), "compiled;", folder)
"""
    printed = run(code, TRITON_CACHE_DIR="/dev/null/cache")
    assert "Triton's cache folder /dev/null/cache cannot be written" in printed
    (folder,) = re.findall(r"^1 compiled; (.*)$", printed, re.M)
    assert not Path(folder).exists()  # gone with the process


def test_cache_folders_of_another_user_are_replaced(tmp_path: Path) -> None:
    """``docker run --user 1000`` with root's HOME, which may not even be looked into."""
    (tmp_path / "file").touch()
    (tmp_path / "locked" / "home").mkdir(parents=True)
    (tmp_path / "locked").chmod(0)
    folders = [str(tmp_path / n) for n in ("locked", "locked/home/.triton/cache", "file/cache")]
    code = f"""
import logging; logging.basicConfig()
import os
from smlp_kernels import _requirements
if os.geteuid() == 0:  # whom no folder is locked to
    os.setuid(65534)
for folder in {folders}:
    os.environ["TRITON_CACHE_DIR"] = folder
    replacement = _requirements.require_cache_folder()
    assert os.environ["TRITON_CACHE_DIR"] == replacement.name != folder
    assert os.access(replacement.name, os.W_OK)
"""
    try:
        printed = run(code, TRITON_CACHE_DIR=str(tmp_path))
    finally:
        (tmp_path / "locked").chmod(0o700)
    for folder in folders:
        assert f"Triton's cache folder {folder} cannot be written; kernels are" in printed


def test_without_any_folder_to_write_the_import_still_works() -> None:
    code = """
import logging; logging.basicConfig()
import tempfile
def none(): raise FileNotFoundError("no usable temporary directory")
tempfile.gettempdir = none; tempfile._get_default_tempdir = none
import smlp_kernels
"""
    assert "nor can another be made" in run(code, TRITON_CACHE_DIR="/dev/null/cache")


def test_without_a_home_no_folder_called_tilde_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "~/.triton/cache")
    replacement = _requirements.require_cache_folder()
    assert replacement is not None and os.environ["TRITON_CACHE_DIR"] == replacement.name


def test_cache_folder_that_can_be_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    assert _requirements.require_cache_folder() is None
    assert not list(tmp_path.iterdir())
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "deep" / "cache")

"""Shared by all tests: which of them can run on this machine, and why the others cannot.

With an NVIDIA GPU the kernels run on it. Without one they run in Triton's interpreter, which has to
be chosen before they are imported.
"""

import dataclasses
import gc
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Tests run side by side and their tensors are small: threads would only get into each other's way.
# Read when torch is imported, also in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# cuDNN's default, TF32, is a thousandth off. Results of GPUs are compared with results of CPUs, and
# held to twice PyTorch's error, which has to be that of float32.
torch.backends.cudnn.allow_tf32 = False

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    # the tests ask for deterministic algorithms, which cuBLAS has only with a fixed workspace
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--complete", action="store_true", help="run what is marked complete, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not HAS_GPU:
        reasons["gpu"] = "needs an NVIDIA GPU: torch.cuda.is_available() is False here"
    if not config.getoption("--complete"):
        reasons["complete"] = "left to make test-all, which takes minutes more"
    for item in items:
        for mark, reason in reasons.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Save half of the time of Triton's interpreter."""
    if HAS_GPU:
        return
    # it makes so many objects that a tenth of its time goes into gc
    gc.freeze()
    gc.set_threshold(100_000)
    # and computes every integer a second time, in 64 bits; sizes that overflow are too large for it
    from triton.runtime import interpreter  # not before TRITON_INTERPRET is set

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def with_room(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call a test with room for the frames of all that it calls.

    CPython 3.11 keeps frames in pieces of 16 KB. Where a loop happens to call across the end of
    one, it asks the system for memory and gives it back each time, for half of a test's time.
    """
    return function(**arguments)


with_room.__code__ = with_room.__code__.replace(co_stacksize=2**16)


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    names = pyfuncitem._fixtureinfo.argnames
    with_room(pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.fixture
def declared_entry_points(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Child processes find the entry points of pyproject.toml, whatever is installed."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    folder = tmp_path_factory.mktemp("path")
    metadata = folder / "declared-0.dist-info"  # its own name: one that is installed hides none
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0\n")
    lines = []
    for group, entry_points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entry_points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One on a GPU, most of whose memory some tests take; else as many as there are cores."""
    return 0 if HAS_GPU else None

"""Shared by all tests: which of them can run on this machine, and why the others cannot.

With an NVIDIA GPU the kernels run on it. Without one they run in Triton's interpreter, which has to
be chosen before they are imported.
"""

import gc
import os

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
    """Triton's interpreter makes so many objects that a tenth of its time goes into gc."""
    if not HAS_GPU:
        gc.freeze()
        gc.set_threshold(100_000)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One on a GPU, most of whose memory some tests take; else as many as there are cores."""
    return 0 if HAS_GPU else None

"""Shared by all tests: which of them can run on this machine, and why the others cannot.

With an NVIDIA GPU the kernels run on it. Without one they run in Triton's interpreter, which has to
be chosen before they are imported.
"""

import os

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

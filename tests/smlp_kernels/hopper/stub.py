"""A driver in place of Triton's, as the Hopper kernels call it, and their inputs."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from smlp.testing import random_arguments
from smlp_kernels import hopper
from smlp_kernels.weights import Weights

BFLOAT16 = torch.bfloat16


class Driver:
    """Notes what it is given; Triton's own kernels do not see it.

    Attributes:
        device: the current one.
        failing: "load" or "launch".
        spilled: registers of what is loaded.
        loads: name, first bytes and shared memory of each binary.
        launches: grid, stream, function, block and the kernel's arguments of each.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.failing, self.spilled = 0, "", 0
        self.loads: list[tuple[Any, ...]] = []
        self.launches: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(load_binary=self.load_binary)
        active = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=self)))
        monkeypatch.setattr(hopper, "triton", active)
        monkeypatch.setattr(hopper, "load", functools.cache(hopper.load.__wrapped__))
        monkeypatch.setattr(hopper, "binary_of", lambda kernel: b"\x7fELF")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        if self.failing == "load":
            raise RuntimeError("Triton Error [CUDA]: no kernel image")
        self.loads.append((name, binary[:8], shared))
        return 1, 1000 + device, 168, self.spilled, 384

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def run(*arguments: Any) -> None:
            if self.failing == "launch":
                raise RuntimeError("Triton Error [CUDA]: invalid argument")
            grid, (stream, function, block, *hooks), given = (
                arguments[:3],
                arguments[3:9],
                arguments[9:],
            )
            assert hooks == [None] * 3 and len(given) == len(source.signature)
            self.launches.append((grid, stream, function, block, given))

        return run


def block(
    batch: int, height: int, width: int, channels: int, dtype: torch.dtype = BFLOAT16, **options
) -> tuple[Tensor, Weights]:
    """A random x, channels last, and the weights of a block."""
    x, weights = random_arguments(batch, height, width, channels, dtype, **options)
    return x.contiguous(memory_format=torch.channels_last), Weights(*weights)

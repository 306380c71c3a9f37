"""The loader's driver: a library of libcuda's functions, compiled by gcc."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smlp.testing import random_arguments
from smlp_kernels.hopper.driver import Driver
from smlp_kernels.weights import Weights

SOURCE = Path(__file__).with_name("libcuda.c")
BFLOAT16 = torch.bfloat16

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to compile a driver")


class Stub:
    """A driver of its own; its variables are those of ``libcuda.c``."""

    def __init__(self, folder: Path) -> None:
        path = folder / "libcuda.so"
        command = ["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*command, str(SOURCE), "-o", str(path)], check=True)
        self._library = ctypes.CDLL(str(path))
        self.driver = Driver(str(path))

    def integer(self, name: str) -> int:
        return ctypes.c_int.in_dll(self._library, name).value

    def long(self, name: str) -> int:
        return ctypes.c_ulonglong.in_dll(self._library, name).value

    def content(self, name: str, size: int) -> bytes:
        return bytes((ctypes.c_ubyte * size).in_dll(self._library, name))

    def integers(self, name: str, count: int) -> list[int]:
        return list((ctypes.c_uint * count).in_dll(self._library, name))

    def set(self, **values: int | bytes) -> None:
        for name, value in values.items():
            if isinstance(value, bytes):
                (ctypes.c_char * 64).in_dll(self._library, name).value = value
            else:
                ctypes.c_int.in_dll(self._library, name).value = value


def block(
    batch: int, height: int, width: int, channels: int, dtype: torch.dtype = BFLOAT16, **options
) -> tuple[Tensor, Weights]:
    """A random x, channels last, and the weights of a block."""
    x, weights = random_arguments(batch, height, width, channels, dtype, **options)
    return x.contiguous(memory_format=torch.channels_last), Weights(*weights)

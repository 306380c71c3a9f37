"""Invented rows, shared by the tests of what is made from them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

FLOOR_US = 30.0


def _row(shape: str, provider: str, us: float, pass_: str = "inference") -> dict[str, Any]:
    return {
        "group": f"{pass_} {shape} bf16 channels_last",
        "provider": provider,
        "pass": pass_,
        "shape": shape,
        "size": [128, 384, 14, 14],
        "dtype": "bf16",
        "layout": "channels_last",
        "gpu_us": us,
        "spread": 0.012,
        "host_us": 50.0,
        "floor_us": FLOOR_US,
        "share_of_floor": FLOOR_US / us,
    }


@pytest.fixture
def row() -> Callable[..., dict[str, Any]]:
    """Make a row of a shape, a provider, microseconds, and a pass."""
    return _row


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""What Triton compiles a kernel for: the same at every batch size, and the same as ahead of time.

Triton's own specialisation is asked, in a process without the interpreter and with a stand-in for
the driver of a GPU.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import itertools
import json
import torch
import triton
from triton.backends.compiler import GPUTarget
from tools import aot
from smlp_kernels.kernels.backward import Needed, mix_backward
from smlp_kernels.kernels.mix import mix
from smlp_kernels.weights import Weights

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())

def empty(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)

def specialisation(call):
    plan = call.plan
    binder = plan.kernel.device_caches[0][-1]
    return [list(pair) for pair in binder(*call.tensors, *plan.integers, **plan.constants)[1]]

def ahead_of_time(call):
    source = aot.source(call)
    constants = {path[0]: value for path, value in source.constants.items()}
    attributes = {path[0]: "D" for path in source.attrs}
    kinds = enumerate(source.signature.values())
    return [[kind, constants.get(i, attributes.get(i))] for i, kind in kinds]

rows = []
for batch, size in itertools.product((1, 7, 16, 128), ((14, 12, 48), (72, 8, 48))):
    h, w, c = size
    x = empty(batch, c, h, w)
    weights = Weights(empty(h, h), empty(h), empty(w, w), empty(w), empty(c, 3 * c), empty(c))
    calls = []
    mix(x, weights, 90, calls.append)
    for needed in ((True, True, True, True), (False, False, True, False)):
        mix_backward(x, x, weights, Needed(*needed), 90, calls.append)
    for call in calls:
        name = call.plan.kernel.__name__
        name += {True: " along H", False: " along W"}.get(call.plan.constants.get("ALONG_H"), "")
        rows.append([name, batch, h, specialisation(call), ahead_of_time(call)])
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def rows() -> list[list[Any]]:
    """Kernel, batch size, height, Triton's specialisation and ours."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("kernel", "height"),
    [
        *(("axes_kernel", 14), ("axes_kernel along H", 14), ("weight_sums_kernel", 14)),
        *(("axes_kernel along H", 72), ("axes_kernel along W", 72)),  # tiles of different warps
        ("copy_images_kernel", 14),
    ],
)
def test_a_new_batch_size_does_not_recompile(
    kernel: str, height: int, rows: list[list[Any]]
) -> None:
    found = {
        batch: json.dumps(key) for name, batch, h, key, _ in rows if (name, h) == (kernel, height)
    }
    assert found.keys() == {1, 7, 16, 128}
    assert len(set(found.values())) == 1


def test_wanted_gradients_do_not_compile_the_sums_again(rows: list[list[Any]]) -> None:
    found = [
        json.dumps(key) for name, _, h, key, _ in rows if (name, h) == ("weight_sums_kernel", 14)
    ]
    assert len(found) == 2 * 4 and len(set(found)) == 1


def test_ahead_of_time_compiles_what_a_launch_does(rows: list[list[Any]]) -> None:
    for kernel, batch, height, key, ours in rows:
        # "" is Triton's for a value that 16 does not divide, None for one it does not look at
        triton = [[kind, None if value == "" else value] for kind, value in key]
        assert ours == triton, (kernel, batch, height)

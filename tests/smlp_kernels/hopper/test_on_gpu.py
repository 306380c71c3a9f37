"""The Hopper kernels on a GPU: values, in a process that they cannot spoil for other tests."""

import json
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import json
import torch
from smlp.testing import EPS, compare_block, random_arguments
from smlp_kernels import fused_smlp, hopper, ops

def required(x, weights):
    ran.append(hopper.mix(x, weights))
    if ran[-1] is None:
        raise RuntimeError("the Hopper kernel did not run")
    return ran[-1]

torch.manual_seed(0)
ran, problems = [], []
ops.run_hopper = required
for dtype in (torch.bfloat16, torch.float16):
    for batch, channels, height, width in SIZES:
        size = (batch, height, width, channels, dtype)
        for biases in ("none", "vectors", "map"):
            x, weights = random_arguments(*size, device="cuda", bias=biases != "none")
            dy, _ = random_arguments(*size, device="cuda", seed=1)
            if biases == "map":
                weights[5] = torch.randn(channels, height, width, device="cuda").to(dtype)
            x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
            arguments = [x.requires_grad_(), *weights]
            for result in compare_block(fused_smlp, arguments, dy, eps=EPS[dtype]):
                if result.problem:
                    problems.append(f"{dtype} {size[:4]} {biases}: {result.name}: {result.problem}")
print(json.dumps([len(ran), problems]))
"""
# B, C, H, W: a tile of each kind, full and not, axes of every class, channels that fill no tile
SIZES = [
    *[(3, 200, 14, 14), (6, 128, 7, 7), (2, 96, 16, 16), (5, 72, 8, 8), (2, 64, 15, 16)],
    *[
        (3, 40, 9, 13),
        (3, 40, 1, 16),
        (3, 40, 16, 1),
        (2, 40, 1, 1),
        (20, 64, 4, 4),
        (300, 8, 2, 2),
    ],
    *[(2, 160, 28, 28), (1, 64, 32, 32), (2, 40, 20, 28), (1, 40, 17, 31), (1, 40, 32, 3)],
]


@pytest.mark.gpu
def test_values() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernels need compute capability 9.0")
    command = [sys.executable, "-c", SCRIPT.replace("SIZES", repr(SIZES))]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-2000:]
    ran, problems = json.loads(child.stdout.splitlines()[-1])
    assert ran == len(SIZES) * 2 * 3 * 2 and not problems, "\n".join(problems)

"""A few lines of PTX as a kernel, on tensors; for tests of the executor itself."""

import numpy as np
import torch
from torch import Tensor

from tests.ptx.launch import Record, extent, launch

HEADER = """
.version 8.3
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet({params}
)
.reqntid {threads}
{{
.reg .pred %p<16>;
.reg .b16 %rs<32>;
.reg .b32 %r<256>;
.reg .b64 %rd<64>;
"""
# %r0: thread, %r1: lane; %rd0, %rd1, ...: addresses of the tensors
PROLOGUE = """
mov.u32 %r0, %tid.x;
and.b32 %r1, %r0, 31;
"""


class Given:
    """Memory of which the tensors named are outputs, not written yet, and all others inputs."""

    def __init__(self, *outputs: Tensor) -> None:
        self.maps = {t.data_ptr(): np.zeros(extent(t), np.uint8) for t in outputs}

    def written(self, tensor: Tensor) -> np.ndarray | None:
        return self.maps.get(tensor.data_ptr())


def run(
    body: str,
    inputs: list[Tensor],
    outputs: list[Tensor],
    *,
    warps: int = 1,
    programs: int = 1,
    shared: int = 0,
    seed: int = 1,
) -> Record:
    """Execute ``body``, in which ``%rdI`` is the address of tensor I, inputs first."""
    tensors = [*inputs, *outputs]
    params = ",".join(
        f"\n.param .u64 .ptr .global .align 1 snippet_{i}" for i in range(len(tensors))
    )
    addresses = "".join(f"ld.param.b64 %rd{i}, [snippet_{i}];\n" for i in range(len(tensors)))
    head = HEADER.format(params=params, threads=32 * warps)
    return launch(
        f"{head}{PROLOGUE}{addresses}{body}\nret;\n}}\n", (programs, 1, 1),
        [("*i8", tensor) for tensor in tensors],
        warps=warps, shared=shared, memory=Given(*outputs), seed=seed,
    )  # fmt: skip


def kinds(record: Record) -> set[str]:
    """The names of the violations."""
    return {text.partition(":")[0] for text in record.violations}


def lanes(body: str, *operands: Tensor, bits: int = 32) -> Tensor:
    """What 32 lanes leave in ``%r9`` (``%rd9`` of 64 bits), from ``operands`` [32] of 64 bits.

    Operand I of a lane is in ``%r1I`` and ``%rd1I``: its low 32 bits and all of it.
    """
    loads = "".join(
        f"mad.wide.u32 %rd30, %r0, 8, %rd{i};\nld.global.b64 %rd1{i}, [%rd30];\n"
        f"ld.global.b32 %r1{i}, [%rd30];\n"
        for i in range(len(operands))
    )
    register = "%rd9" if bits == 64 else "%r9"
    store = (
        f"mad.wide.u32 %rd31, %r0, 8, %rd{len(operands)};\nst.global.b{bits} [%rd31], {register};"
    )
    result = torch.zeros(32, dtype=torch.int64)
    record = run(f"{loads}{body}\n{store}", list(operands), [result])
    if record.violations:
        raise AssertionError(record.violations)
    return result

"""Compiling a call of a kernel for any chip, on a machine without one, and reading the result.

Registers, spills, shared memory and instructions are facts of the compiled binary, so they can be
held to bounds without a GPU; speed cannot.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smlp_kernels.launch import INTERPRETED, Call

KIB = 1024
# Largest shared memory of one program in bytes, CUDA C++ Programming Guide, table of technical
# specifications per compute capability.
SHARED_MEMORY = {
    80: 163 * KIB,
    86: 99 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    100: 227 * KIB,
    120: 99 * KIB,
}
TRITON_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
TENSOR_MEMORY_COLUMNS = 512  # of compute capability 10.0
# Triton's pipeliner may overwrite what a pending product still reads: see Resources.problems.
ASYNCHRONOUS_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")
# Instructions on local memory that a loop may have, by kernel. They read what does not change in
# the loop; without the bound of registers two programs would run on a multiprocessor, not three
# (simulated, backward of 56x56x96: 288 us with them, 349 without).
LOOP_SPILLS = {"narrow_kernel": 48}
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);", re.M)


@dataclass(frozen=True)
class Resources:
    """Resources and instructions of one compiled kernel."""

    registers: int  # of a thread
    spills: int  # bytes of a thread, spill stores and loads together
    loop_spills: int  # instructions that touch local memory inside a loop
    # The same for shared memory, but for asynchronous copies. Stores are tiles that change their
    # layout on the way from one product to the next; loads are those and operands of products.
    loop_stores: int
    loop_loads: int
    shared: int  # bytes
    tensor_memory: int  # columns
    serialized: bool  # wgmma products wait for each other (ptxas C7510 and relatives)
    instructions: Counter[str]
    loop_spills_allowed: int = 0

    def problems(self, arch: int) -> list[str]:
        """Why this must not be shipped for a chip of compute capability ``arch`` / 10."""
        found = []
        if self.shared > SHARED_MEMORY[arch]:
            found.append(f"shared memory {self.shared} of {SHARED_MEMORY[arch]} bytes")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"tensor memory {self.tensor_memory} of {TENSOR_MEMORY_COLUMNS} columns")
        if self.loop_spills > self.loop_spills_allowed:
            found.append(f"{self.loop_spills} local-memory instructions in loops")
        if self.serialized:
            found.append("wgmma serialized")
        copies = [n for n in ASYNCHRONOUS_COPIES if self.instructions[n]]
        if copies:
            found.append(
                f"asynchronous copies ({', '.join(copies)}), whose pipeline may overwrite what a "
                "pending wgmma still reads (triton-lang/triton#6691)"
            )
        return found


def compile_call(call: Call, arch: int) -> Resources:
    """Compile exactly what a launch of ``call`` on a chip of this compute capability would compile.

    Args:
        call: its tensors may be on the meta device.
        arch: ten times the compute capability, one of ``SHARED_MEMORY``.

    Raises:
        RuntimeError: in Triton's interpreter, which does not compile.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: the interpreter has nothing to compile")
    with _ptxas_log() as log:
        compiled = triton.compile(
            source(call),
            target=GPUTarget("cuda", arch, 32),
            options=call.plan.options,
        )
    text = log.getvalue()
    registers = re.search(r"Used (\d+) registers", text)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    if registers is None:
        raise RuntimeError(f"ptxas reported no registers; its log was: {text[:2000]!r}")
    sass = disassemble(compiled.asm["cubin"])
    in_loops = loop_instructions(sass)
    return Resources(
        registers=int(registers[1]),
        spills=sum(map(int, spilled)),
        loop_spills=in_loops["LDL"] + in_loops["STL"],
        loop_stores=in_loops["STS"] + in_loops["STSM"],
        loop_loads=in_loops["LDS"] + in_loops["LDSM"],
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        serialized=bool(re.search(r"wgmma\S* instructions are serialized", text)),
        instructions=Counter(name for _, name, _ in INSTRUCTION.findall(sass)),
        loop_spills_allowed=LOOP_SPILLS.get(call.plan.kernel.__name__, 0),
    )


def source(call: Call) -> ASTSource:
    """Return what Triton's launcher compiles for a call: integers are as they are."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    plan, given = call.plan, (*call.tensors, *call.plan.integers)
    for index, name in enumerate(plan.kernel.arg_names):
        value = given[index] if index < len(given) else plan.constants[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TRITON_TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]  # allocations are aligned
        elif index < len(given) and value is not None:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[name] = value
    return ASTSource(plan.kernel, signature, constants, attributes)


@contextlib.contextmanager
def _ptxas_log() -> Iterator[io.StringIO]:
    """Collect what ptxas says; a cached binary would not tell, so caching is off inside."""
    knobs = triton.knobs
    before = (knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile)
    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
    try:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            yield log
    finally:
        knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = before


def disassemble(cubin: bytes) -> str:
    """SASS of a binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        nvdisasm = triton.knobs.nvidia.nvdisasm.path
        command = [nvdisasm, "-ndf", str(path)]  # no data flow: it takes a third of the time
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout


def loop_instructions(sass: str) -> Counter[str]:
    """Instructions, by name, between a backward branch and its target.

    A loop of few steps that ptxas unrolled is not found.
    """
    labels = {}
    address = -1
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x?_?\d+):", line):
            labels[label[1]] = address
        elif match := INSTRUCTION.match(line):
            address = int(match[1], 16)
    found = [(int(match[1], 16), match[2], match[3]) for match in INSTRUCTION.finditer(sass)]
    loops = []
    for address, name, operands in found:
        target = re.search(r"`\((\.L_x?_?\d+)\)", operands)
        if name == "BRA" and target and labels.get(target[1], address) < address:
            loops.append((labels[target[1]], address))
    return Counter(
        name for address, name, _ in found if any(top < address <= end for top, end in loops)
    )

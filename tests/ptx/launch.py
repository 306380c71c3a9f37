"""A launch of decoded PTX on tensors in this machine's memory, and what it did wrong."""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from tests.ptx.builder import Program
from tests.ptx.compiled import executor
from tests.ptx.decoder import decode

GRAIN = 2  # as in machine.h
MAX_NOTES = 64
INTEGERS = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u32": "<I", "u64": "<Q"}
VIOLATIONS = (  # in the order of machine.h
    "global access out of bounds",
    "misaligned global access",
    "read of global memory never written",
    "read of shared memory never written",
    "read after write without barrier",
    "write after read without barrier",
    "write after write without barrier",
    "read of an asynchronous copy before its wait",
    "write over an asynchronous copy in flight",
    "write over an operand of a wgmma in flight",
    "register of a wgmma in flight",
    "register changed without wgmma.fence",
    "wgmma reads what was written without fence.proxy.async",
    "wgmma reads an asynchronous copy without fence.proxy.async",
    "element written twice in one launch",
    "one program writes what another reads",
    "shared access out of bounds",
    "misaligned shared access",
    "divergent lanes or operand",
    "barrier not reached by all warps",
    "lanes of a warp exchange data without bar.warp.sync",
    "write to an input",
)
# Type as Triton names it ("*" and more for a tensor, or None) and value.
Argument = tuple[str, Any]


class Memory(Protocol):
    """What is known of the memory of tensors."""

    def written(self, tensor: Tensor) -> np.ndarray | None:
        """A byte for each byte from the tensor's first on, 0: never written; None: an input."""


class _Note(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int32) for n in ("kind", "line", "program", "warp", "lane", "other")),
        ("address", ctypes.c_uint64),
        ("extra", ctypes.c_int64),
    )


class _Violations(ctypes.Structure):
    _fields_ = (
        ("counts", ctypes.c_uint64 * len(VIOLATIONS)),
        ("notes", ctypes.c_int32),
        ("note", _Note * MAX_NOTES),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("host", ctypes.c_void_p),
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("written", ctypes.c_void_p),
        ("writer", ctypes.c_void_p),
        ("reader", ctypes.c_void_p),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("warps", "reg_bytes", "const_bytes")),
        ("constants", ctypes.c_char_p),
        ("params", ctypes.c_char_p),
        *((name, ctypes.c_int32) for name in ("param_bytes", "shared_bytes")),
        ("grid", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in ("buffer_count", "early_copies")),
        ("seed", ctypes.c_uint64),
        ("buffers", ctypes.c_void_p),
        ("violations", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Record:
    """A launch that ran."""

    kernel: str
    programs: int
    violations: list[str]  # a line for each kind, with its first place


def launch(
    text: str,
    grid: tuple[int, int, int],
    arguments: Sequence[Argument],
    *,
    warps: int,
    shared: int,
    memory: Memory,
    seed: int = 1,
    early_copies: bool = False,
) -> Record:
    """Run every program of a grid.

    Args:
        text: PTX of one entry function.
        grid: programs along x, y, z.
        arguments: one for each parameter.
        warps: of a program.
        shared: bytes of shared memory of a program.
        memory: which tensors are inputs, and what has been written to the others.
        seed: of the order in which warps run.
        early_copies: cp.async writes when it is issued, not only when it is waited for: the other
            extreme of what may happen, for the values that a race gives.

    Raises:
        PtxError: for PTX that the executor does not know.
        ValueError: if the arguments are not those of the entry function.
    """
    program = decode(text)
    if program.threads != 32 * warps:
        raise ValueError(f"warps: {program.threads} threads compiled, {warps} warps launched")
    buffers: list[_Buffer] = []
    users: dict[int, np.ndarray] = {}  # of a storage: programs that write and read each GRAIN

    def place(tensor: Tensor) -> int:
        """Its virtual address: tensors lie 2**40 apart, aligned as they are in memory."""
        pointer, storage = tensor.data_ptr(), tensor.untyped_storage()
        base = (len(buffers) + 1 << 40) + (pointer & 255)
        written = memory.written(tensor)
        maps: tuple[int | None, ...] = (None, None, None)
        if written is not None:
            address = storage.data_ptr()
            if address not in users:
                users[address] = np.zeros((2, storage.nbytes() // GRAIN + 1), np.uint32)
            first = (pointer - address) // GRAIN
            maps = (written.ctypes.data, *(row[first:].ctypes.data for row in users[address]))
        buffers.append(_Buffer(pointer, base, extent(tensor), *maps))
        return base

    params = parameters(program, arguments, place)
    violations = _Violations()
    array = (_Buffer * max(1, len(buffers)))(*buffers)
    given = _Launch(
        ctypes.addressof(program.code), ctypes.addressof(program.pool), warps, program.reg_bytes,
        len(program.constants), program.constants, params, len(params), shared,
        (ctypes.c_int32 * 3)(*grid), len(buffers), int(early_copies), seed,
        ctypes.addressof(array), ctypes.addressof(violations),
    )  # fmt: skip
    executor().run(ctypes.byref(given))
    return Record(program.name, grid[0] * grid[1] * grid[2], described(violations, program))


def parameters(program: Program, arguments: Sequence[Argument], place: Any) -> bytes:
    """The bytes of all parameters."""
    if len(arguments) != len(program.params):
        raise ValueError(
            f"arguments: {program.name} has {len(program.params)} parameters, got {len(arguments)}"
        )
    params = bytearray(sum(program.params[-1]) if program.params else 0)
    for (at, size), (kind, value) in zip(program.params, arguments, strict=True):
        if kind.startswith("*"):
            data = struct.pack("<Q", 0 if value is None else place(value))
        else:
            data = struct.pack(INTEGERS[kind], value)
        if len(data) != size:
            raise ValueError(
                f"arguments: {program.name} has {size} bytes, got {len(data)} of {kind}"
            )
        params[at : at + size] = data
    return bytes(params)


def extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def described(violations: _Violations, program: Program) -> list[str]:
    """A line for each kind of violation that occurred, with its first place."""
    first: dict[int, str] = {}
    for note in violations.note[: violations.notes]:
        first.setdefault(
            note.kind,
            f"program {note.program} warp {note.warp} lane {note.lane} other {note.other} "
            f"address {note.address:#x} extra {note.extra}, line {note.line} of the PTX "
            f"({program.sources.get(note.line, '')}): {program.text[note.line - 1].strip()[:100]}",
        )
    return [
        f"{name}: {count} times, first: {first.get(kind, 'unknown')}"
        for kind, (name, count) in enumerate(zip(VIOLATIONS, violations.counts, strict=True))
        if count
    ]

"""Decoded instructions and their operands: registers become offsets, immediates constants."""

import ctypes
import re
import struct
from dataclasses import dataclass

from tests.ptx.compiled import op_codes

LANES = 32
SHARED_BASE = 1024  # as in machine.h: address of the first byte of shared memory
PREDICATE = 0  # in the place of a width in bytes: a bit for each lane
FLOAT = re.compile(r"0[fFdD][0-9A-Fa-f]+$")
WIDTHS = {
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
}

Operand = tuple[str, int]  # as written, and its width


class PtxError(Exception):
    """PTX that the executor does not know."""


class Ins(ctypes.Structure):
    """An instruction, as in machine.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("op", "guard", "negate", "results", "operands")),
        *((name, ctypes.c_int32) for name in ("first", "size", "vector")),
        ("imm", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("flags", "line", "width")),
    )


@dataclass
class Program:
    """One entry function, decoded.

    Attributes:
        code: of ``Ins``, which point into ``pool``.
        pool: offsets of registers, those of constants last.
        params: offset and size of each parameter.
        sources: ``file:line`` that a line of the PTX was made of.
    """

    name: str
    text: list[str]
    code: ctypes.Array
    pool: ctypes.Array
    reg_bytes: int
    constants: bytes
    params: list[tuple[int, int]]
    threads: int
    sources: dict[int, str]


class Builder:
    """Collects instructions; ``line`` and ``guard`` are those of the next one."""

    def __init__(self) -> None:
        self.codes = op_codes()
        self.code: list[Ins] = []
        self.line = 0
        self.guard: str | None = None  # such as "!%p1"
        self.params: dict[str, tuple[int, int]] = {}
        self.shared_symbols = {"global_smem"}
        self.reg_bytes = 0
        self._slots: dict[str, int] = {}
        self._widths: dict[str, int] = {}
        self._pool: list[int] = []
        self._in_constants: list[int] = []  # places in the pool that are offsets into constants
        self._constants: dict[tuple[int, int], int] = {}
        self._constant_bytes = bytearray()

    def error(self, message: str) -> PtxError:
        return PtxError(f"line {self.line}: {message}")

    def declare(self, name: str, width: int) -> None:
        """A register of 16 bits takes the room of 32."""
        self._slots[name] = self.reg_bytes
        self._widths[name] = width
        self.reg_bytes += {PREDICATE: 64, 8: 256}.get(width, 128)

    def add_param(self, name: str, size: int) -> None:
        end = max((at + bytes_ for at, bytes_ in self.params.values()), default=0)
        self.params[name] = (-(-end // size) * size, size)

    def parameter(self, name: str) -> int:
        """Its offset."""
        if name not in self.params:
            raise self.error(f"unknown parameter {name}")
        return self.params[name][0]

    def register(self, name: str) -> int:
        if name not in self._slots:
            raise self.error(f"unknown register {name}")
        return self._slots[name]

    def is_wide(self, name: str) -> bool:
        """Whether a register has 64 bits."""
        return self._widths.get(name) == 8

    def scratch(self, width: int) -> str:
        """A register for results that nobody reads, or that ``blend`` reads at once."""
        name = f"%scratch{width}"
        if name not in self._slots:
            self.declare(name, width)
        return name

    def emit(self, op: str, operands: list[Operand], results: int, **fields: int) -> None:
        """Add an instruction whose first operands are its results."""
        if op not in self.codes:
            raise self.error(f"the executor has no {op}")
        ins = Ins(op=self.codes[op], guard=-1, results=results, operands=len(operands),
                  first=len(self._pool), line=self.line,
                  width=operands[0][1] if results else 0, **fields)  # fmt: skip
        for text, width in operands:
            self._add_operand(self.scratch(width) if text == "_" else text, width)
        if self.guard is not None:
            ins.guard = self.register(self.guard.lstrip("!"))
            ins.negate = int(self.guard.startswith("!"))
        self.code.append(ins)

    def finish(self, name: str, text: list[str], threads: int, sources: dict[int, str]) -> Program:
        for place in self._in_constants:
            self._pool[place] += self.reg_bytes  # constants lie behind the registers
        return Program(
            name, text, (Ins * len(self.code))(*self.code),
            (ctypes.c_int32 * max(1, len(self._pool)))(*self._pool), self.reg_bytes,
            bytes(self._constant_bytes), list(self.params.values()), threads, sources,
        )  # fmt: skip

    def _add_operand(self, text: str, width: int) -> None:
        if text.startswith("%"):
            self._pool.append(self.register(text))
            if {width, self._widths[text]} & {8, PREDICATE} != {width} & {8, PREDICATE}:
                raise self.error(f"{text} of {self._widths[text]} bytes, expected {width}")
            return
        self._in_constants.append(len(self._pool))
        self._pool.append(self._constant(self._value(text, width), width))

    def _value(self, text: str, width: int) -> int:
        if text in self.shared_symbols:
            return SHARED_BASE
        if text in self.params:
            return self.parameter(text)
        if FLOAT.match(text):
            return int(text[2:], 16)
        try:
            value = int(text.rstrip("U"), 0)
        except ValueError:
            raise self.error(f"unknown operand {text}") from None
        if width == PREDICATE:
            return -1 if value else 0
        return value & 0xFFFF if width == 2 else value

    def _constant(self, value: int, width: int) -> int:
        """Offset of a register that holds a value in every lane."""
        if (value, width) not in self._constants:
            self._constants[value, width] = len(self._constant_bytes)
            pack, count = {8: ("<Q", LANES), PREDICATE: ("<I", 16)}.get(width, ("<I", LANES))
            bits = value & (2 ** (8 * struct.calcsize(pack)) - 1)
            self._constant_bytes += struct.pack(pack, bits) * count
        return self._constants[value, width]

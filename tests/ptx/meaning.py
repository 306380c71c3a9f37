"""What instructions compute, written in Python from the PTX ISA: the oracle of the executor."""

import re
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch


def bits_of(type_: str) -> int:
    return 16 if type_ in ("bf16", "f16") else int(re.sub(r"\D", "", type_.replace("x2", "")))


def signed(value: int, bits: int) -> int:
    value &= 2**bits - 1
    return value - 2**bits if value >> (bits - 1) else value


def number(value: int, type_: str) -> Any:
    """The value that these bits have in a type."""
    if type_ == "bf16":
        return number(value << 16, "f32")
    if type_ == "f16":
        return np.frombuffer(struct.pack("<H", value & 0xFFFF), np.float16)[0].astype(np.float32)
    if type_ == "f32":
        return np.frombuffer(struct.pack("<I", value & 0xFFFFFFFF), np.float32)[0]
    if type_ == "f64":
        return np.frombuffer(struct.pack("<Q", value & (2**64 - 1)), np.float64)[0]
    bits = bits_of(type_)
    return signed(value, bits) if type_.startswith("s") else value & (2**bits - 1)


def encoded(value: Any, type_: str) -> int:
    """The bits that a value has in a type, rounded to the nearest, ties to even."""
    if type_ in ("bf16", "f16"):
        dtype = torch.bfloat16 if type_ == "bf16" else torch.float16
        return torch.tensor(float(value)).to(dtype).view(torch.int16).item() & 0xFFFF
    if type_ == "f32":
        return int(np.float32(value).view(np.uint32))
    if type_ == "f64":
        return int(np.float64(value).view(np.uint64))
    return int(value) & (2 ** bits_of(type_) - 1)


def divided(a: int, b: int) -> int:
    """Towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": divided,
    "rem": lambda a, b: a - divided(a, b) * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "min": min,
    "max": max,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "neu": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def fused(a: Any, b: Any, c: Any) -> Any:
    """a b + c with one rounding; values of few bits are exact in float64 for float32."""
    return float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def bit_field(a: int, position: int, length: int, bits: int, is_signed: bool) -> int:
    position, length = position & 255, length & 255
    if not length:
        return 0
    wide = signed(a, bits) if is_signed else a
    field = wide >> position
    length = min(length, bits - position) if is_signed and position < bits else length
    return signed(field, length) if is_signed else field & (2**length - 1)


def permuted(a: int, b: int, selector: int) -> int:
    source = struct.pack("<II", a, b)
    result = bytearray()
    for i in range(4):
        which = selector >> 4 * i & 15
        byte = source[which & 7]
        result.append((255 if byte & 128 else 0) if which & 8 else byte)
    return int.from_bytes(result, "little")


def meaning(name: str, a: int, b: int, c: int) -> int:
    """Bits of the result of ``name`` for bits of its operands."""
    head, *middle, type_ = name.split(".")
    if head == "mov":
        return encoded(number(a, type_), type_)
    if "x2" in type_:  # two halves of 32 bits
        one = name.removesuffix("x2")
        high = meaning(one, a >> 32, b >> 32, c >> 32)
        return meaning(one, a, b, c) | high << 32
    if head == "cvt":
        return converted(middle[-1], type_, a, b)
    if head in ("shl", "shr"):
        bits, by = bits_of(type_), b & 0xFFFFFFFF
        value = number(a, type_)
        shifted = value << min(by, 2 * bits) if head == "shl" else value >> min(by, bits)
        return encoded(shifted, type_)
    if head == "bfe":
        return encoded(
            bit_field(number(a, "u" + type_[1:]), b, c, bits_of(type_), type_[0] == "s"), type_
        )
    if head == "prmt":
        return permuted(number(a, "u32"), number(b, "u32"), number(c, "u32"))
    if head == "shf":
        both = number(b, "u32") << 32 | number(a, "u32")
        by = c & 31
        return both << by >> 32 & 0xFFFFFFFF if middle[0] == "l" else both >> by & 0xFFFFFFFF
    x, y, z = (number(v, type_) for v in (a, b, c))
    if head == "neg":
        return encoded(-x, type_)
    if head == "not":
        return encoded(~x, type_)
    if head == "abs":
        return encoded(abs(x), type_)
    if type_ in ("bf16", "f16"):  # mixed: float32 but for what is multiplied
        return encoded(
            fused(x, y, number(c, "f32")) if head == "fma" else x + number(b, "f32"), "f32"
        )
    if head == "fma":
        return encoded(fused(x, y, z), type_)
    if head == "mad":
        wide = "wide" in middle
        to = f"{type_[0]}{2 * bits_of(type_)}" if wide else type_
        return encoded(x * y + number(c, to), to)
    if head == "mul" and "hi" in middle:
        return encoded(x * y >> bits_of(type_), type_)
    if head == "mul" and "wide" in middle:
        return encoded(x * y, f"{type_[0]}{2 * bits_of(type_)}")
    if head == "setp":
        return int(BINARY[middle[0]](x, y))
    return encoded(BINARY[head](x, y), type_)


def converted(to: str, source: str, a: int, b: int) -> int:
    if to == "tf32":  # to nearest, ties away from zero: on the magnitude
        return (a & 0xFFFFFFFF) + 0x1000 & 0xFFFFE000
    if to.endswith("x2"):
        return converted(to[:-2], source, a, 0) << 16 | converted(to[:-2], source, b, 0)
    return encoded(number(a, source), to)

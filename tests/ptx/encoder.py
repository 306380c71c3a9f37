"""One PTX instruction to those of the executor."""

import re

from tests.ptx.builder import PREDICATE, WIDTHS, Builder

# flags, as in machine.h
TRANSPOSED, A_IN_MEMORY, A_TRANSPOSED, B_TRANSPOSED = 1, 2, 4, 8
TF32, F16, SIGNED, SCALE_IN_PREDICATE, PARAM_IN_REGISTER = 16, 32, 64, 128, 256
WIDE = 512

# shape and types of d, a, b, c: instruction, width of a register, registers of d, a, b, c
MMA = {
    ("m16n8k16", "f32", "bf16", "bf16", "f32"): ("mma.bf16", 4, (4, 4, 2, 4)),
    ("m16n8k16", "f32", "f16", "f16", "f32"): ("mma.f16", 4, (4, 4, 2, 4)),
    ("m16n8k8", "f32", "tf32", "tf32", "f32"): ("mma.tf32", 4, (4, 4, 2, 4)),
    ("m16n8k8", "f32", "bf16", "bf16", "f32"): ("mma.bf16.k8", 4, (4, 2, 1, 4)),
    ("m16n8k8", "f32", "f16", "f16", "f32"): ("mma.f16.k8", 4, (4, 2, 1, 4)),
    ("m8n8k4", "f64", "f64", "f64", "f64"): ("mma.f64.884", 8, (2, 1, 1, 2)),
    ("m16n8k16", "f64", "f64", "f64", "f64"): ("mma.f64.16816", 8, (4, 8, 4, 4)),
}
GROUPS = {
    "cp.async.commit_group": "cp.async.commit_group",
    "wgmma.fence.sync.aligned": "wgmma.fence",
    "wgmma.commit_group.sync.aligned": "wgmma.commit_group",
}
BARRIERS = ("bar.sync", "barrier.sync", "barrier.cta.sync.aligned")
SPECIAL = re.compile(r"%(tid|ctaid|nctaid)\.([xyz])$")


def encode(builder: Builder, name: str, operands: list[str]) -> None:
    """Append what ``name operands`` does.

    Raises:
        PtxError: for an instruction or a variant that the executor does not have.
    """
    parts = name.split(".")
    head = parts[0]
    if head in ("bra", "ret"):
        builder.emit(head, [], 0)
    elif name in BARRIERS:
        if operands != ["0"]:
            raise builder.error(f"barrier {operands}: only barrier 0 of all warps is known")
        builder.emit("bar.sync", [], 0)
    elif name == "bar.warp.sync":
        builder.emit(name, [], 0)
    elif name in GROUPS:
        builder.emit(GROUPS[name], [], 0)
    elif name in ("cp.async.wait_group", "wgmma.wait_group.sync.aligned"):
        builder.emit(name.removesuffix(".sync.aligned"), [], 0, imm=int(operands[0]))
    elif name == "cp.async.wait_all":
        builder.emit("cp.async.commit_group", [], 0)
        builder.emit("cp.async.wait_group", [], 0)
    elif name.startswith("cp.async.c") and ".shared.global" in name:
        copy(builder, operands)
    elif name.startswith("fence.proxy.async"):
        builder.emit("fence.proxy.async", [], 0)
    elif name.startswith("wgmma.mma_async"):
        wgmma(builder, parts, operands)
    elif head == "mma":
        mma(builder, parts, operands)
    elif head in ("ldmatrix", "stmatrix"):
        matrix(builder, parts, operands)
    elif name.startswith("ld.param"):
        load_parameter(builder, parts, operands)
    elif head in ("ld", "st"):
        memory(builder, parts, operands)
    elif name.startswith("shfl.sync"):
        shuffle(builder, name, operands)
    else:
        guarded(builder, name, parts, operands)


def elements(text: str) -> list[str]:
    """``{%r1, %r2}`` or ``%r1``: the registers."""
    return [part.strip() for part in text.strip("{}").split(",")]


def address(text: str) -> tuple[str, int]:
    """``[ %r1 + 16 ]``: register and offset."""
    base, _, offset = text.strip("[]").replace(" ", "").partition("+")
    return base, int(offset, 0) if offset else 0


def vector_of(parts: list[str]) -> int:
    return next((int(part[1:]) for part in parts if re.match(r"v\d$", part)), 1)


# ---- memory ----


def memory(builder: Builder, parts: list[str], operands: list[str]) -> None:
    """ld and st of global and shared memory."""
    head, space, width = parts[0], parts[1].partition("::")[0], WIDTHS[parts[-1]]
    load = head == "ld"
    values = elements(operands[0 if load else 1])
    base, offset = address(operands[1 if load else 0])
    if space not in ("global", "shared") or vector_of(parts) != len(values):
        raise builder.error(f"{'.'.join(parts)} {operands}")
    wide = any(builder.is_wide(register) for register in values)  # or wider than what it holds
    data = [(register, 8 if wide else width) for register in values]
    place = [(base, 8 if space == "global" else 4)]
    flags = (SIGNED if parts[-1][0] == "s" else 0) | (WIDE if wide else 0)
    builder.emit(
        f"{head}.{space}", [*data, *place] if load else [*place, *data],
        len(data) if load else 0, size=width, vector=len(data), imm=offset, flags=flags,
    )  # fmt: skip


def load_parameter(builder: Builder, parts: list[str], operands: list[str]) -> None:
    """Of one parameter, or of one whose address a register has."""
    type_, size = parts[-1], WIDTHS[parts[-1]]
    base, offset = address(operands[1])
    by_register = base.startswith("%")
    if not by_register:
        offset += builder.parameter(base)
    flags = (SIGNED if type_[0] == "s" else 0) | (PARAM_IN_REGISTER if by_register else 0)
    for i, register in enumerate(elements(operands[0])):
        wide = builder.is_wide(register)
        builder.emit(
            "ld.param", [(register, 8 if wide else 4), *([(base, 8)] if by_register else [])], 1,
            size=size, vector=1, imm=offset + i * size, flags=flags | (WIDE if wide else 0),
        )  # fmt: skip


def matrix(builder: Builder, parts: list[str], operands: list[str]) -> None:
    """ldmatrix and stmatrix."""
    head = parts[0]
    load = head == "ldmatrix"
    data = [(register, 4) for register in elements(operands[0 if load else 1])]
    base, offset = address(operands[1 if load else 0])
    if f"x{len(data)}" not in parts or parts[-1] != "b16" or builder.guard is not None:
        raise builder.error(f"{'.'.join(parts)} {operands}")
    builder.emit(
        head, [*data, (base, 4)] if load else [(base, 4), *data], len(data) if load else 0,
        vector=len(data), imm=offset, flags=TRANSPOSED if "trans" in parts else 0,
    )  # fmt: skip


def copy(builder: Builder, operands: list[str]) -> None:
    """cp.async of 4, 8 or 16 bytes, of which the source may have fewer."""
    to, offset = address(operands[0])
    base, global_offset = address(operands[1])
    source = [(size, 4) for size in operands[3:]]
    builder.emit(
        "cp.async", [(to, 4), (base, 8), *source], 0,
        size=int(operands[2], 0), imm=offset, flags=global_offset,
    )  # fmt: skip


# ---- products ----


def mma(builder: Builder, parts: list[str], operands: list[str]) -> None:
    shape = next((part for part in parts if re.match(r"m\d+n\d+k\d+$", part)), "")
    key = (shape, *parts[-4:])
    if key not in MMA or not {"row", "col"} <= set(parts):
        raise builder.error(f"the executor has no {'.'.join(parts)}")
    op, width, counts = MMA[key]
    lists = [elements(operand) for operand in operands]
    if tuple(map(len, lists)) != counts:
        raise builder.error(f"{op}: registers {lists}")
    builder.emit(op, [(r, width) for registers in lists for r in registers], counts[0])


def wgmma(builder: Builder, parts: list[str], operands: list[str]) -> None:
    """d, a, b, scale-d, then immediates: signs of a and b, for 16-bit types whether transposed."""
    shape = next(re.match(r"m64n(\d+)k(\d+)$", p) for p in parts if p.startswith("m64"))
    n, k = map(int, shape.groups())
    d, a, b, scale, *rest = operands
    signs, transposes = [int(x) for x in rest[:2]], [int(x) for x in rest[2:]]
    types = {"bf16": 0, "f16": F16, "tf32": TF32}
    sums = [(register, 4) for register in elements(d)]
    in_memory = not a.startswith("{")
    matrices = 0 if parts[-1] == "tf32" else 1 + in_memory
    if (
        parts[-3] != "f32"
        or parts[-1] not in types
        or signs != [1, 1]
        or (len(sums), len(transposes)) != (n // 2, matrices)
    ):
        raise builder.error(f"the executor has no {'.'.join(parts)} {rest}")
    flags = types[parts[-1]] | (A_IN_MEMORY if in_memory else 0)
    if transposes:
        flags |= B_TRANSPOSED if transposes[-1] else 0
        flags |= A_TRANSPOSED if in_memory and transposes[0] else 0
    left = [(a, 8)] if in_memory else [(register, 4) for register in elements(a)]
    by_predicate = scale.startswith("%")
    builder.emit(
        "wgmma", [*sums, *left, (b, 8), *([(scale, PREDICATE)] if by_predicate else [])],
        len(sums), size=k, vector=n, imm=0 if by_predicate else int(scale),
        flags=flags | (SCALE_IN_PREDICATE if by_predicate else 0),
    )  # fmt: skip


# ---- instructions that change one register ----


def shuffle(builder: Builder, name: str, operands: list[str]) -> None:
    target, _, valid = operands[0].partition("|")
    builder.emit(name, [(operand, 4) for operand in (target, *operands[1:])], 1)
    if valid:  # of idx and bfly over a whole warp: always
        builder.emit("mov.pred", [(valid, PREDICATE), ("1", PREDICATE)], 1)


def guarded(builder: Builder, name: str, parts: list[str], operands: list[str]) -> None:
    """With a guard, the result goes into a scratch register and from there where it holds."""
    guard, builder.guard = builder.guard, None
    target = operands[0]
    if guard is not None:
        if target.startswith("{"):
            raise builder.error(f"guarded {name} with several results")
        width = 8 if builder.is_wide(target) else PREDICATE if target.startswith("%p") else 4
        operands = [builder.scratch(width), *operands[1:]]
    arithmetic(builder, name, parts, operands)
    if guard is not None:
        builder.guard = guard
        builder.emit("blend", [(target, width), (operands[0], width)], 1, size=width)


def arithmetic(builder: Builder, name: str, parts: list[str], operands: list[str]) -> None:
    """Register to register."""
    head, last = parts[0], parts[-1]
    width = WIDTHS.get(last, 0)
    if head == "mov":
        move(builder, last, width, operands)
    elif head == "cvta":  # one address space here
        builder.emit("mov.b64", [(operand, 8) for operand in operands], 1)
    elif head == "setp":
        widths = [PREDICATE, width, width]
        builder.emit(name, list(zip(operands, widths, strict=True)), 1)
    elif head == "selp":
        widths = [width, width, width, PREDICATE]
        op = "selp.b64" if width == 8 else "selp.b32"
        builder.emit(op, list(zip(operands, widths, strict=True)), 1)
    elif last == "pred":
        builder.emit(name, [(operand, PREDICATE) for operand in operands], 1)
    elif head == "cvt":
        result = WIDTHS.get(parts[-2], 4)  # 4: two halves, or TF32
        widths = [result, *[width] * (len(operands) - 1)]
        builder.emit(name, list(zip(operands, widths, strict=True)), 1)
    else:
        widths = operand_widths(head, parts, width, len(operands))
        builder.emit(name, list(zip(operands, widths, strict=True)), 1)


def operand_widths(head: str, parts: list[str], width: int, count: int) -> list[int]:
    """Of an instruction whose last part is a type of this width."""
    if parts[-1] in ("bf16", "f16"):  # mixed: the result and the last operand are float32
        return [4, *[2] * (count - 2), 4]
    if "wide" in parts:
        return [2 * width, width, width, 2 * width][:count]
    if head in ("shl", "shr"):
        return [width, width, 4]
    if head == "bfe":
        return [width, width, 4, 4]
    return [width] * count


def move(builder: Builder, type_: str, width: int, operands: list[str]) -> None:
    d, a = operands
    half = width // 2
    if match := SPECIAL.match(a):
        builder.emit(match[1], [(d, 4)], 1, imm="xyz".index(match[2]))
    elif type_ == "pred":
        builder.emit("mov.pred", [(d, PREDICATE), (a, PREDICATE)], 1)
    elif a.startswith("{"):
        parts = [(register, half) for register in elements(a)]
        builder.emit("pack32" if width == 8 else "pack16", [(d, width), *parts], 1)
    elif d.startswith("{"):
        parts = [(register, half) for register in elements(d)]
        builder.emit("unpack32" if width == 8 else "unpack16", [*parts, (a, width)], len(parts))
    else:
        builder.emit("mov.b64" if width == 8 else "mov.b32", [(d, width), (a, width)], 1)

"""``python -m tools.hopper_ptx``: write what is generated of the Hopper kernel, by nvcc 13.0.

In smlp_kernels/hopper the wrappers of matrix products, and the PTX text of all kernels, which is
what a wheel carries.
"""

import lzma
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "smlp_kernels" / "hopper"
PRODUCTS, KERNELS = FOLDER / "products.cuh", FOLDER / "kernels.cu"
SHIPPED = FOLDER / "kernels.ptx.xz"
NVCC = "13.0"  # another one writes another text
VERSION = "8.0"  # of PTX: the oldest that has all of its instructions
SIZES = (200, 248, 256)  # pixels of a tile
A_K16, TAKEN_K16 = [f"a[{i}]" for i in range(4)], "const uint32_t (&a)[4], uint32_t b0, uint32_t b1"


def products() -> str:
    """C++ source of the matrix products that the kernels use."""
    parts = [
        "// Written by tools/hopper_ptx.py.\n#pragma once\n",
        mma("mma_k8", 8, ("a0", "a1"), ("b0",), "uint32_t a0, uint32_t a1, uint32_t b0"),
        mma("mma_k16", 16, A_K16, ("b0", "b1"), TAKEN_K16),
        mma("mma_k16_add", 16, A_K16, ("b0", "b1"), TAKEN_K16, add=True),
        *map(wgmma, SIZES),
    ]
    return "".join(parts)


def wgmma(n: int) -> str:
    """d += a b by wgmma m64 n N k16, both operands in shared memory, sums in registers."""
    count = n // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""\
#define WGMMA_{n}(TYPE) asm volatile( \\
  "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n" \\
  "wgmma.mma_async.sync.aligned.m64n{n}k16.f32." TYPE "." TYPE \\
  " {{{registers}}}, %{count}, %{count + 1}, p, 1, 1, %{count + 3}, 0;\\n}}\\n" \\
  : {sums} : "l"(a), "l"(b), "r"(1), "n"(A_TRANSPOSED))
template <class T, int A_TRANSPOSED>
DEVICE void wgmma(float (&d)[{count}], uint64_t a, uint64_t b) {{
  if constexpr (__is_same(T, bf16)) WGMMA_{n}("bf16"); else WGMMA_{n}("f16");
}}
"""


def mma(
    name: str, k: int, a: Sequence[str], b: Sequence[str], taken: str, *, add: bool = False
) -> str:
    """d = a b + bias0, bias1 in every row, or d += a b, by mma.sync m16 n8 k K."""
    operands = [f"%{i}" for i in range(4, 4 + len(a) + len(b))]
    first, second = ", ".join(operands[: len(a)]), ", ".join(operands[len(a) :])
    bias = [f"%{4 + len(operands)}", f"%{5 + len(operands)}"]
    start = ", ".join(["%0", "%1", "%2", "%3"] if add else bias * 2)
    sums = ", ".join(f'"{"+" if add else "="}f"(d[{i}])' for i in range(4))
    given = ", ".join(f'"r"({value})' for value in (*a, *b))
    macro = name.upper()
    return f"""\
#define {macro}(TYPE) asm volatile( \\
  "mma.sync.aligned.m16n8k{k}.row.col.f32." TYPE "." TYPE ".f32 " \\
  "{{%0, %1, %2, %3}}, {{{first}}}, {{{second}}}, {{{start}}};" \\
  : {sums} : {given}{"" if add else ', "f"(bias0), "f"(bias1)'})
template <class T>
DEVICE void {name}(float (&d)[4], {taken}{"" if add else ", float bias0, float bias1"}) {{
  if constexpr (__is_same(T, bf16)) {macro}("bf16"); else {macro}("f16");
}}
"""


def missing() -> str | None:
    """Why the text cannot be compiled here, or None."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc on the PATH"
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    if f"release {NVCC}," not in printed.stdout:
        return f"nvcc is not of CUDA {NVCC}: {printed.stdout.splitlines()[-1]}"
    return None


def compile_ptx(source: Path) -> str:
    """PTX text of a file, without comments."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "text.ptx")
        command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90a", "-ptx", "-o", str(target)]
        subprocess.run([*command, str(source)], check=True)
        text = re.sub(r"(?m)^\.version .*$", f".version {VERSION}", target.read_text())
    dropped = ("//", '.pragma "used_bytes_mask')  # of a later version, and a hint
    lines = (line for line in text.splitlines() if not line.strip().startswith(dropped))
    return "\n".join(line for line in lines if line.strip()) + "\n"


def shipped_ptx(kernel: str | None = None) -> str:
    """PTX text as it ships: of all kernels, or of one alone."""
    text = lzma.decompress(SHIPPED.read_bytes()).decode()
    if kernel is None:
        return text
    head, *kernels = re.split(r"(?m)^(?=\.visible \.entry)", text)
    return head + next(one for one in kernels if one.startswith(f".visible .entry {kernel}("))


def main() -> None:
    if reason := missing():
        raise SystemExit(f"hopper_ptx: {reason}")
    PRODUCTS.write_text(products())
    packed = lzma.compress(compile_ptx(KERNELS).encode(), preset=9 | lzma.PRESET_EXTREME)
    SHIPPED.write_bytes(packed)
    print(f"written: {SHIPPED} ({len(packed)} bytes)")


if __name__ == "__main__":
    main()

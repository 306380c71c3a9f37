"""``python -m tools.hopper_ptx``: write what is generated in smlp_kernels/hopper, by nvcc 13.0.

The wrapper of wgmma, and the PTX text of all kernels, which is what a wheel carries.
"""

import lzma
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "smlp_kernels" / "hopper"
WRAPPER, PTX = FOLDER / "wgmma.cuh", FOLDER / "kernels.ptx.xz"
NVCC = "13.0"  # another one writes another text
VERSION = "8.0"  # of PTX: the oldest that has all of its instructions
SIZES = (200, 248, 256)  # pixels of a tile


def wrapper() -> str:
    """C++ source of d += a b by wgmma m64nNk16, operands in shared memory, sums in registers."""
    parts = ["// Written by tools/hopper_ptx.py.\n#pragma once\n"]
    for n in SIZES:
        count = n // 2
        registers = ", ".join(f"%{i}" for i in range(count))
        sums = ", ".join(f'"+f"(d[{i}])' for i in range(count))
        parts.append(f"""\
#define WGMMA_{n}(TYPE) asm volatile( \\
  "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n" \\
  "wgmma.mma_async.sync.aligned.m64n{n}k16.f32." TYPE "." TYPE \\
  " {{{registers}}}, %{count}, %{count + 1}, p, 1, 1, %{count + 3}, 0;\\n}}\\n" \\
  : {sums} : "l"(a), "l"(b), "r"(1), "n"(A_TRANSPOSED))
template <class T, int A_TRANSPOSED>
__device__ __forceinline__ void wgmma(float (&d)[{count}], uint64_t a, uint64_t b) {{
  if constexpr (IS_BF16<T>) WGMMA_{n}("bf16"); else WGMMA_{n}("f16");
}}
""")
    return "".join(parts)


def missing() -> str | None:
    """Why the text cannot be compiled here, or None."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc on the PATH"
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    if f"release {NVCC}," not in printed.stdout:
        return f"nvcc is not of CUDA {NVCC}: {printed.stdout.splitlines()[-1]}"
    return None


def compile_ptx() -> str:
    """PTX text of ``kernels.cu``, without comments."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernels.ptx")
        command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90a", "-ptx", "-o", str(target)]
        subprocess.run([*command, str(FOLDER / "kernels.cu")], check=True)
        text = re.sub(r"(?m)^\.version .*$", f".version {VERSION}", target.read_text())
    dropped = ("//", '.pragma "used_bytes_mask')  # of a later version, and a hint
    lines = (line for line in text.splitlines() if not line.strip().startswith(dropped))
    return "\n".join(line for line in lines if line.strip()) + "\n"


def shipped_ptx() -> str:
    """PTX text of all kernels as it lies in the package."""
    return lzma.decompress(PTX.read_bytes()).decode()


def main() -> None:
    if reason := missing():
        raise SystemExit(f"hopper_ptx: {reason}")
    WRAPPER.write_text(wrapper())
    packed = lzma.compress(compile_ptx().encode(), preset=9 | lzma.PRESET_EXTREME)
    PTX.write_bytes(packed)
    print(f"written: {WRAPPER}, {PTX} ({len(packed)} bytes)")


if __name__ == "__main__":
    main()

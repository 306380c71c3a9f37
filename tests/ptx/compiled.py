"""The executor's C files, compiled for this machine when they are first needed."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "executor"
BUILD = Path(__file__).parent / "build"  # ignored by git
# floats as IEEE has them, integers that wrap, registers that are read as several types
OPTIONS = [
    *("-O3", "-march=native", "-flto", "-ffp-contract=off", "-fno-math-errno", "-fwrapv"),
    *("-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
]


def missing() -> str | None:
    """Why the executor cannot be compiled here, or None."""
    if shutil.which("gcc") is None:
        return "no gcc, which compiles the executor (Triton's launcher needs it as well)"
    return None


@functools.cache
def executor() -> ctypes.CDLL:
    """The executor, compiled once for each state of its files."""
    digest = hashlib.sha256(platform.node().encode())  # -march=native
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    target = BUILD / f"executor-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        BUILD.mkdir(exist_ok=True)
        new = target.with_suffix(f".{os.getpid()}")
        files = map(str, sorted(SOURCES.glob("*.c")))
        subprocess.run(["gcc", *OPTIONS, *files, "-o", str(new), "-lm"], check=True)
        new.rename(target)  # others may compile at the same time
    loaded = ctypes.CDLL(str(target))
    loaded.op_name.restype = ctypes.c_char_p
    return loaded


@functools.cache
def op_codes() -> dict[str, int]:
    """Number of every instruction, by the names in instructions.h."""
    names = []
    while (name := executor().op_name(len(names))) is not None:
        names.append(name.decode())
    return {name: number for number, name in enumerate(names)}

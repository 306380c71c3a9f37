"""A stand-in for a machine with a GPU, so that code for one can run without it.

Everything is computed on the CPU, whatever device is asked for. What code on a GPU can trip over is
as on a real one: the signatures of torch.cuda's functions, graphs that are captured and replayed on
streams of their own, TF32 as a default of cuDNN's and by hardware that truncates, an interpreter of
Triton's that does not work, packages that are missing. No kernel of Triton's runs; each is compiled
for the GPU when it is launched.

A process is such a machine when ``tests/rehearsal/site`` is on its path (:func:`environment`), and
so are its children.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MISSING = "REHEARSAL_MISSING_PACKAGES"


def environment(missing: Iterable[str] = ()) -> dict[str, str]:
    """Variables for a process that is to see a GPU, but none of the ``missing`` packages."""
    # pytest-benchmark switches itself off where pytest-xdist's variables are seen
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):
        kept.pop(name, None)
    paths = [str(HERE / "site"), str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": f"{HERE / 'bin'}{os.pathsep}{kept['PATH']}",
        MISSING: ",".join(missing),
    }


def pretend() -> None:
    """Make this process one of a machine with a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 on a GPU machine, whose NumPy is too new for that")
    from tests.rehearsal import cuda, driver, project

    cuda.install()
    driver.use()
    missing = os.environ[MISSING].split(",")
    sys.meta_path.insert(0, Imports(project.CHANGES, missing))


class Imports(importlib.abc.MetaPathFinder):
    """Changes modules when they are imported, and hides packages.

    Args:
        changes: what is done to a module after its own code, by its name.
        missing: names of packages that are not to be found.
    """

    def __init__(
        self, changes: dict[str, Callable[[ModuleType], None]], missing: Sequence[str]
    ) -> None:
        self._changes, self._missing = changes, missing

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self._missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        change = self._changes.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if change else None
        if spec is None or spec.loader is None or change is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec

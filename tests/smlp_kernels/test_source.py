"""Properties of the source itself: one launch, no waiting, nothing that fetches or runs code."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("smlp", "smlp_kernels", "examples")
LIBRARY = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
KERNELS = sorted((ROOT / "smlp_kernels" / "kernels").glob("*.py"))
LAUNCH = ROOT / "smlp_kernels" / "launch.py"
OPS = ROOT / "smlp_kernels" / "ops.py"
WARMUP = ROOT / "smlp_kernels" / "warmup.py"

# Names by which one program could wait for another. Without any of them every program ends.
WAITING = re.compile(r"atomic|inline_asm|barrier|volatile|semaphore|(^|_)lock$")
# Others' variables are read to show them, not to act on them.
OWN_VARIABLES = {
    "SMLP_KERNELS_DISABLE",
    "SMLP_KERNELS_HOPPER",
    "TRITON_INTERPRET",
}
OWN_FOLDERS = {*PACKAGES, "tools", "benchmarks", "docs", "tests"}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}
TOOLS = {"smlp-kernels", "ruff", "mypy", "pip-audit", "pytest-benchmark", "pytest-xdist"}
TOOLS |= {"onnx", "tensorboard"}  # which torch imports for us
TORCHRUN = {"LOCAL_RANK", "RANK", "WORLD_SIZE"}  # set by torch's launcher, part of its interface


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(node: ast.AST) -> str:
    """``a.b.c`` of a name or of an attribute; ``?`` stands for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return "?"


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))


def modules_imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module or package that is imported, without what lies inside."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").partition(".")[0]


def test_nothing_in_smlp_imports_the_kernels() -> None:
    """Not even in a function, nor by a name in a string."""
    for path in (ROOT / "smlp").rglob("*.py"):
        nodes = list(ast.walk(tree(path)))
        texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        names = {re.split("[.:]", text)[0] for text in texts}
        names |= {name for _, name in modules_imported(path)}
        assert "smlp_kernels" not in names, path


def test_kernels_are_launched_in_one_place_under_the_device_guard() -> None:
    """``kernel[grid](...)`` takes the current device, so a bare one is wrong on a second GPU."""
    found = {
        path.relative_to(ROOT).as_posix(): [c for c in calls(path) if is_launch(c) or is_warmup(c)]
        for path in LIBRARY
        if path not in KERNELS
    }
    assert {name for name, there in found.items() if there} == {"smlp_kernels/launch.py"}
    # by Triton and by the compiled kernel, both in Call.launch, which operators are given
    assert sum(map(is_launch, found["smlp_kernels/launch.py"])) == 2
    for path, guarded, expected in (
        (WARMUP, lambda call: name_of(call.func).endswith(".by_triton"), 1),
        (OPS, lambda call: "Call.launch" in map(ast.unparse, call.args), 2),
    ):
        guards = [
            node
            for node in ast.walk(tree(path))
            if isinstance(node, ast.With)
            and re.match(r"(launch\.)?on_device_of\(", ast.unparse(node.items[0].context_expr))
        ]
        calls_there = [call for call in calls(path) if guarded(call)]
        assert len(calls_there) == expected
        for call in calls_there:
            assert any(g.lineno < call.lineno <= (g.end_lineno or 0) for g in guards), call.lineno
    # the Hopper kernel's driver takes the device itself
    others = {p.parent.name for p in LIBRARY if p != OPS and ".launch(" in p.read_text()}
    assert others <= {"hopper"}


def is_launch(call: ast.Call) -> bool:
    """``something[...](...)``, or a JIT function's own ``run``."""
    return isinstance(call.func, ast.Subscript) or name_of(call.func).endswith("kernel.run")


def is_warmup(call: ast.Call) -> bool:
    """A JIT function's own way to compile."""
    return name_of(call.func).endswith("kernel.warmup")


def test_the_grid_has_one_axis() -> None:
    """Its y and z end at 65535; x goes to 2^31 - 1."""
    by_triton, direct = sorted(
        (c for c in calls(LAUNCH) if is_launch(c)),
        key=lambda c: not isinstance(c.func, ast.Subscript),
    )
    assert isinstance(by_triton.func, ast.Subscript)
    assert isinstance(by_triton.func.slice, ast.Tuple) and len(by_triton.func.slice.elts) == 1
    assert ast.unparse(direct.args[0]).startswith("*(plan.programs, 1, 1, ")
    for path in KERNELS:
        axes = [ast.unparse(c.args[0]) for c in calls(path) if name_of(c.func) == "tl.program_id"]
        assert set(axes) <= {"0"}, path


def decorator_name(node: ast.AST) -> str:
    return name_of(node.func if isinstance(node, ast.Call) else node)


def compiled(path: Path) -> Iterator[ast.AST]:
    """The functions of a module that Triton compiles."""
    for node in ast.walk(tree(path)):
        decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
        if "triton.jit" in map(decorator_name, decorators):
            yield node


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_no_kernel_can_wait(path: Path) -> None:
    """All loops count to a bound known before them, and no program reads what another writes."""
    for node in (node for kernel in compiled(path) for node in ast.walk(kernel)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.While), where
        if isinstance(node, ast.For):
            assert isinstance(node.iter, ast.Call), where
            assert name_of(node.iter.func) in ("range", "tl.range", "tl.static_range"), where
        if isinstance(node, ast.Attribute | ast.Name):
            own = name_of(node) in ("tl.debug_barrier", "debug_barrier")  # of one program's warps
            assert own or not WAITING.search(name_of(node)), f"{where}: {name_of(node)}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_are_not_tuned_at_run_time(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            found = set(map(decorator_name, node.decorator_list))
            assert found <= {"triton.jit", "property", "functools.cache", "functools.lru_cache"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_weights_alone_are_loaded_and_no_text_is_compiled(path: Path) -> None:
    """What no rule of the linter knows; the others are in pyproject.toml."""
    for call in calls(path):
        where = f"{path}:{call.lineno}"
        name = name_of(call.func)
        assert name not in ("compile", "__import__"), f"{where}: {name}"
        if name == "torch.load":
            safe = [ast.unparse(k.value) for k in call.keywords if k.arg == "weights_only"]
            assert safe == ["True"], f"{where}: torch.load without weights_only=True"


def test_what_is_imported_is_named_as_a_dependency() -> None:
    """Not only brought along by another package, which may stop doing so."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    named = {re.split(r"[^\w-]", requirement)[0] for group in groups for requirement in group}
    sources = [path for folder in OWN_FOLDERS for path in (ROOT / folder).rglob("*.py")]
    imported = {DISTRIBUTIONS.get(m, m) for path in sources for _, m in modules_imported(path)}
    assert imported - sys.stdlib_module_names - OWN_FOLDERS == named - TOOLS


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nobody_is_told_to_install_another_project(path: Path) -> None:
    """``smlp`` on PyPI is not ours, and our own name is anyone's until it is published."""
    assert not re.search(r"pip install\W+smlp", path.read_text())


def variables_read(path: Path) -> Iterator[str]:
    """Names of environment variables that are read, by constant names."""
    for node in ast.walk(tree(path)):
        name: ast.AST | None = None
        if isinstance(node, ast.Call) and name_of(node.func) in ("os.environ.get", "os.getenv"):
            name = node.args[0]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            name = node.slice if name_of(node.value) == "os.environ" else None
        elif isinstance(node, ast.Compare) and name_of(node.comparators[0]) == "os.environ":
            name = node.left
        if isinstance(name, ast.Constant):
            yield str(name.value)


def test_environment_variables_are_few_and_documented() -> None:
    read = {name for path in LIBRARY for name in variables_read(path)}
    assert read - TORCHRUN == OWN_VARIABLES
    readme = (ROOT / "README.md").read_text()
    for name in OWN_VARIABLES:
        assert re.search(rf"`{name}(=[01])?`", readme), name

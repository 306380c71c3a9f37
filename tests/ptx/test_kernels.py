"""The kernels as compiled, executed: values, memory, synchronisation. README.md says what it takes.

They have to be compiled, and this process may be in Triton's interpreter: one run of
``python -m tests.ptx.full`` executes a selection, and each line of it is a test here.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ptx import compiled, full
from tests.ptx.blocks import PRECISIONS, Outcome
from tests.ptx.cases import STAGES, Task, quick_selection, selection, shipped
from tests.ptx.kernels import has_tile

ROOT = Path(__file__).parents[2]
TASKS = selection()
QUICK = {task.name for task in quick_selection()}

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))


@pytest.fixture(scope="module")
def lines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    log = tmp_path_factory.mktemp("ptx") / "log"
    hidden = {"TRITON_INTERPRET": None, "CUDA_VISIBLE_DEVICES": ""}  # compiled, and no GPU's
    environment = {k: v for k, v in (os.environ | hidden).items() if v is not None}
    which = "--selection" if request.config.getoption("--complete") else "--quick"
    command = [sys.executable, "-m", "tests.ptx.full", which, "--log", str(log)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if not log.exists():
        pytest.fail(f"{' '.join(command)} wrote nothing:\n{result.stdout}\n{result.stderr}")
    return log.read_text().splitlines()


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=() if task.name in QUICK else pytest.mark.complete)
        for task in TASKS
    ],
    ids=lambda task: task.name,
)
def test_as_compiled(task: Task, lines: list[str]) -> None:
    places = [i for i, line in enumerate(lines) if line.split(" | ")[2:3] == [task.name]]
    assert len(places) == 1, f"expected one line for {task.name}, got {len(places)}"
    (place,) = places
    what = [lines[place]]
    for line in lines[place + 1 :]:
        if not line.startswith("  "):
            break
        what.append(line)
    assert lines[place].startswith("ok | "), "\n".join(what)


def test_every_chip_type_layout_and_size_is_in_the_selection() -> None:
    names = [task.name.split() for task in TASKS if task.group == "selection"]
    found = {tuple(name[:3]) for name in names}
    chips, layouts = ("sm_80", "sm_90"), ("NHWC", "NCHW")
    assert found >= set(itertools.product(chips, ("bf16", "tf32"), layouts))
    assert found >= set(itertools.product(chips, ("fp16", "fp64"), ("NHWC",)))
    assert found >= set(itertools.product(("sm_90",), ("fp32", "fp64"), layouts))
    tuned = {name[3] for name in names if name[:3] == ["sm_90", "bf16", "NHWC"]}
    stages = {"x".join(map(str, size)) for sizes in STAGES.values() for size in sizes}
    assert len(stages) == 12 and tuned >= stages


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32", "fp64"])
@pytest.mark.parametrize("arch", [80, 90])
def test_every_tile_of_the_table_is_in_the_selection(arch: int, precision: str) -> None:
    """Tiles follow from the next power of two of H and W; float32 has the same on both chips."""
    dtype, *_ = PRECISIONS[precision]
    archs = (80, 90) if precision == "fp32" else (arch,)
    found = {
        max(16, 1 << (side - 1).bit_length())
        for block in shipped()
        if block.precision == precision and block.arch in archs
        for side in block.size[2:]
    }
    wanted = {size for size in (16, 32, 64, 128, 256) if has_tile(arch, dtype, size)}
    assert {16, 32, 64} <= wanted <= found


def test_names_are_unique() -> None:
    names = {task.name for task in TASKS}
    assert len(names) == len(TASKS) and names > QUICK


def test_a_log_is_continued(tmp_path: Path) -> None:
    good, bad = Outcome([], {"x": (1e-3, 2e-3)}, 5), Outcome(["race"], {}, 5)
    tasks = [Task("bf16", name, lambda: good) for name in ("first", "second")]
    log = tmp_path / "log"
    outcomes = zip(tasks, (good, bad), strict=True)
    log.write_text("# head\n" + "\n".join(full.line_of(t, o, 1.0) for t, o in outcomes) + "\n")
    assert full.passed(log) == {("bf16", "first")}
    assert full.passed(tmp_path / "none") == set()


def test_an_error_is_a_problem() -> None:
    def run() -> Outcome:
        raise ValueError("no such shape")

    outcome, _ = full.run(Task("bf16", "broken", run))
    assert outcome.problems and "ValueError" in outcome.problems[0]
    assert full.line_of(Task("bf16", "broken", run), outcome, 1.0).startswith("FAILED | bf16")


def test_without_a_compiler_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no gcc" in str(compiled.missing())
    assert full.main(["--quick"]) == 2
    assert "nothing can be executed: no gcc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group", "bf17"], "--group: expected some of bf16, "),
        (["--share", "3"], "--share: expected I/N with I from 1 to N, got 3"),
        (["--share", "5/4"], "--share: expected I/N with I from 1 to N, got 5/4"),
        (["--only", "sm_70"], "--only: no run has 'sm_70' in its name"),
    ],
)
def test_wrong_options_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        full.main(arguments)
    assert message in capsys.readouterr().err

"""Options, fixtures, machine information and the summary table of ``pytest benchmarks``."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, providers, shapes
from benchmarks.ceilings import describe, measure_ceilings
from benchmarks.roofline import PASSES, Ceilings
from benchmarks.summary import summary_lines
from benchmarks.timing import L2Flush
from benchmarks.workbench import CompileBudget, Workbench

# Without a GPU every provider and pass runs once on shapes that take milliseconds.
_DEFAULTS = {
    "shapes": ("stages", "rehearsal"),
    "providers": ("all", "all"),
    "passes": ("inference,fwd+bwd", ",".join(PASSES)),
    "dtypes": ("bf16", "fp32,bf16,fp16,tf32"),
    "layouts": ("channels_last", "channels_last,nchw"),
}
_CEILINGS = pytest.StashKey[Ceilings | None]()
_ROWS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smlp benchmarks", "comma-separated choices")
    known = {
        "shapes": [*shapes.GROUPS, *shapes.BY_NAME],
        "providers": ["all", *providers.PROVIDERS],
        "passes": PASSES,
        "dtypes": shapes.DTYPES,
        "layouts": shapes.LAYOUTS,
    }
    for name, (with_gpu, without) in _DEFAULTS.items():
        group.addoption(
            f"--{name}",
            help=f"among {', '.join(known[name])}; default {with_gpu} ({without} without a GPU)",
        )
    group.addoption(
        "--compile-seconds",
        type=float,
        default=180.0,
        help="what all max-autotune compilations may take together; later ones are skipped",
    )


def chosen(config: pytest.Config, option: str) -> list[str]:
    """The comma-separated value of an option, or its default for this machine."""
    value = config.getoption(f"--{option}")
    return (value or _DEFAULTS[option][not torch.cuda.is_available()]).split(",")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    config.stash[_CEILINGS] = None
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # on shapes this small a second thread only adds waiting


def pytest_report_header() -> list[str]:
    facts = ", ".join(f"{name} {value}" for name, value in environment.describe().items())
    banner = [] if torch.cuda.is_available() else [environment.NOT_PERFORMANCE]
    return [f"benchmarks on: {facts}", *banner]


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config) -> Ceilings | None:
    """Copy bandwidth and matrix rates of this GPU, measured at the start of the run."""
    if torch.cuda.is_available():
        pytestconfig.stash[_CEILINGS] = measure_ceilings(tuple(chosen(pytestconfig, "dtypes")))
    return pytestconfig.stash[_CEILINGS]


@pytest.fixture(scope="session")
def flush() -> L2Flush:
    return L2Flush()


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """One entry per benchmark that ran, for the summary table."""
    return pytestconfig.stash[_ROWS]


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A compiler cache of this run's own: nothing tuned earlier, elsewhere, slips in."""
    with tempfile.TemporaryDirectory(prefix="smlp-inductor-") as folder:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield Path(folder)
        if before is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


class WorkbenchSlot:
    """Holds the workbench of the current shape, dtype and layout, and no other."""

    def __init__(self, budget: CompileBudget) -> None:
        self._budget = budget
        self._key: tuple[shapes.Shape, str, str] | None = None
        self._bench: Workbench | None = None

    def get(self, shape: shapes.Shape, dtype: str, layout: str) -> Workbench:
        if self._bench is None or self._key != (shape, dtype, layout):
            self.close()
            self._bench = Workbench(shape, dtype, layout, self._budget)
            self._key = (shape, dtype, layout)
        return self._bench

    def close(self) -> None:
        if self._bench is not None:
            self._bench.close()
        self._bench = None


@pytest.fixture(scope="session")
def slot(pytestconfig: pytest.Config, compile_cache: Path) -> Iterator[WorkbenchSlot]:
    slot = WorkbenchSlot(CompileBudget(pytestconfig.getoption("--compile-seconds")))
    yield slot
    slot.close()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["smlp"] = environment.describe()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    ceilings = config.stash[_CEILINGS]
    output_json["ceilings"] = asdict(ceilings) if ceilings else None
    output_json["is_performance"] = torch.cuda.is_available()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    terminalreporter.section("sMLP block")
    if not torch.cuda.is_available():
        terminalreporter.write_line(environment.NOT_PERFORMANCE, yellow=True, bold=True)
    if ceilings := config.stash[_CEILINGS]:
        terminalreporter.write_line(describe(ceilings))
    for line in summary_lines(rows):
        terminalreporter.write_line(line)

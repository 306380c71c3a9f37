"""Options, fixtures, machine information and what ``pytest benchmarks`` prints at its end."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks import environment, providers, shapes
from benchmarks.report import Report, tables
from benchmarks.roofline import PASSES, Ceilings, measure_ceilings
from benchmarks.timing import Step, l2_flush
from benchmarks.workbench import CompileBudget, Workbench, open_workbench
from smlp.machine import in_words

# Without a GPU every provider and pass runs once on shapes that take milliseconds.
_OPTIONS: dict[str, tuple[str, str, Iterable[str]]] = {  # default with a GPU, without, choices
    "shapes": ("stages", "rehearsal", (*shapes.GROUPS, *shapes.BY_NAME)),
    "providers": ("all", "all", ("all", *providers.PROVIDERS)),
    "passes": ("inference,fwd+bwd", ",".join(PASSES), PASSES),
    "dtypes": ("bf16", "fp32,bf16,fp16,tf32", shapes.DTYPES),
    "layouts": ("channels_last", "channels_last,nchw", shapes.LAYOUTS),
}
_CEILINGS = pytest.StashKey[Ceilings | None]()
_ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smlp benchmarks", "comma-separated choices")
    for name, (with_gpu, without, known) in _OPTIONS.items():
        text = f"among {', '.join(known)}; default {with_gpu} ({without} without a GPU)"
        group.addoption(f"--{name}", help=text)
    group.addoption(
        "--compile-seconds",
        type=float,
        default=180.0,
        help="what all max-autotune compilations may take together; later ones are skipped",
    )


def chosen(config: pytest.Config, option: str) -> list[str]:
    """The comma-separated value of an option, or its default for this machine."""
    value = config.getoption(f"--{option}")
    return (value or _OPTIONS[option][not torch.cuda.is_available()]).split(",")


def runnable(config: pytest.Config) -> list[providers.Provider]:
    """The chosen providers that can be measured on this machine, in one layout at least."""
    wanted = providers.select(chosen(config, "providers"))
    return [provider for provider in wanted if provider.why_not("channels_last") is None]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # a table for every group, of wall times alone
    config.stash[_CEILINGS], config.stash[_ROWS] = None, []
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # on shapes this small a second thread only adds waiting


def pytest_report_header() -> list[str]:
    return [f"benchmarks on: {in_words(environment.describe())}"]


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config) -> Ceilings | None:
    """Copy bandwidth and matrix rates of this GPU, measured at the start of the run."""
    if torch.cuda.is_available():
        pytestconfig.stash[_CEILINGS] = measure_ceilings(chosen(pytestconfig, "dtypes"))
    return pytestconfig.stash[_CEILINGS]


@pytest.fixture(scope="session")
def flush() -> Step:
    return l2_flush()


@pytest.fixture(scope="session")
def compile_budget(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CompileBudget]:
    """Seconds for torch.compile, and an empty cache: nothing that was tuned before slips in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield CompileBudget(pytestconfig.getoption("--compile-seconds"))


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, compile_budget: CompileBudget) -> Iterator[Workbench]:
    """The workbench of a shape, dtype and layout; pytest closes it before it opens the next."""
    with open_workbench(*request.param, compile_budget) as bench:
        yield bench


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["smlp"] = environment.describe()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    ceilings = config.stash[_CEILINGS]
    output_json["ceilings"] = asdict(ceilings) if ceilings else None
    output_json["is_performance"] = torch.cuda.is_available()


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_benchmark_group_stats(config: pytest.Config, benchmarks: list[dict[str, Any]]) -> None:
    config.stash[_ROWS] = [one["extra_info"] for one in benchmarks]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("sMLP block")
    rows, ceilings = config.stash[_ROWS], config.stash[_CEILINGS]
    if ceilings is None:
        lines = _rehearsed(config, len(rows))
    else:
        rows = [row for row in rows if row.get("gpu_us") is not None]
        lines = [str(ceilings), "", *tables(Report(rows, ceilings, {}).series())]
        lines.append("Latency, host time and memory of each are in the JSON.")
    for line in lines:
        terminalreporter.write_line(line)


def _rehearsed(config: pytest.Config, count: int) -> list[str]:
    """Say what would be measured with a GPU, and what was run instead."""
    options = {name: config.getoption(f"--{name}") or _OPTIONS[name][0] for name in _OPTIONS}
    lines = [environment.NOT_PERFORMANCE, "", "With a GPU this measures"]
    lines += [f"  {name:<10} {value}" for name, value in options.items()]
    lines += [
        "in GPU time with its share of the floor, latency, host time and memory.",
        "",
        f"Here, {count} benchmarks ran on {', '.join(chosen(config, 'shapes'))}, to",
        "show that the harness works. Left out:",
    ]
    wanted = providers.select(chosen(config, "providers"))
    reasons = (provider.why_not("channels_last") for provider in wanted)
    return [*lines, *(f"  {reason}" for reason in reasons if reason)]


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line names what was written."""
    if config.option.collectonly:
        return
    target = config.getoption("benchmark_json", None) if config.stash.get(_ROWS, []) else None
    print("written:", target or "nothing; --benchmark-json=FILE keeps what was measured")

"""Options, fixtures, machine information and what ``pytest benchmarks`` prints at its end."""

from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, providers, report, shapes
from benchmarks.roofline import PASSES, Ceilings, measure_ceilings
from benchmarks.workbench import Workbench, open_workbench
from smlp.machine import in_words

# Without a GPU every provider and pass runs once on shapes that take milliseconds.
_OPTIONS: dict[str, tuple[str, str, Collection[str]]] = {  # default with a GPU, without, choices
    "shapes": ("small", "rehearsal", (*shapes.GROUPS, *shapes.BY_NAME)),
    "providers": ("all", "all", ("all", *providers.PROVIDERS)),
    "passes": ("inference,fwd+bwd", ",".join(PASSES), PASSES),
    "dtypes": ("bf16", "fp32,bf16,fp16,tf32", shapes.DTYPES),
    "layouts": ("channels_last", "channels_last,nchw", shapes.LAYOUTS),
}
NOTHING = "nothing; --benchmark-json=FILE keeps what was measured"
_CEILINGS = pytest.StashKey[Ceilings | None]()
_ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("smlp", "smlp benchmarks, comma-separated choices")
    for name, (with_gpu, without, known) in _OPTIONS.items():
        text = f"among {', '.join(known)}; default {with_gpu} ({without} without a GPU)"
        group.addoption(f"--{name}", help=text)
    text = "folder for report.md and share_of_floor.png, if there is a GPU"
    group.addoption("--report", type=Path, metavar="FOLDER", help=text)


def chosen(config: pytest.Config, option: str) -> list[str]:
    """The comma-separated value of an option, or its default for this machine."""
    with_gpu, without, _ = _OPTIONS[option]
    default = with_gpu if torch.cuda.is_available() else without
    return (config.getoption(f"--{option}") or default).split(",")


def runnable(config: pytest.Config, layout: str) -> list[providers.Provider]:
    """The chosen providers that can be measured on this machine with x in a layout."""
    wanted = providers.select(chosen(config, "providers"))
    return [provider for provider in wanted if provider.why_not(layout) is None]


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


@pytest.fixture(scope="session", autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache for torch.compile: nothing that was tuned before slips in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Iterator[Workbench]:
    """The workbench of a shape, dtype, layout and pass; pytest closes it before the next."""
    shape, dtype, layout, pass_ = request.param
    wanted = runnable(pytestconfig, layout)
    with open_workbench(shape, dtype, layout, pass_, wanted) as bench:
        yield bench


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    ceilings = config.stash[_CEILINGS]
    output_json["ceilings"] = asdict(ceilings) if ceilings else None
    output_json["machine_info"]["smlp"] = environment.describe()


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_benchmark_group_stats(config: pytest.Config, benchmarks: list[dict[str, Any]]) -> None:
    config.stash[_ROWS] = [one["extra_info"] for one in benchmarks]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the tables, or what would be in them; the last line names what was written."""
    rows, ceilings = config.stash.get(_ROWS, []), config.stash.get(_CEILINGS, None)
    if not rows:
        return
    written = [config.getoption("benchmark_json", None)]
    if ceilings is None:
        lines = _rehearsed(config, len(rows))
    else:
        rows = [row for row in rows if "gpu_us" in row]
        facts = in_words(environment.describe(), report.FACTS)
        lines = [f"`pytest benchmarks`: {facts}", "", str(ceilings), "", *report.tables(rows)]
        lines += ["Latency, host time and memory of each are in the JSON."]
        if (folder := config.getoption("report")) is not None:
            written += report.write(folder, lines, rows, facts)
    print("", *lines, "", sep="\n")
    print("written:", *(filter(None, written) if any(written) else [NOTHING]))


def _rehearsed(config: pytest.Config, count: int) -> list[str]:
    """Say what would be measured with a GPU, and what was run instead."""
    options = {name: config.getoption(f"--{name}") or _OPTIONS[name][0] for name in _OPTIONS}
    wanted = providers.select(chosen(config, "providers"))
    reasons = filter(None, (provider.why_not("channels_last") for provider in wanted))
    return [
        environment.NOT_PERFORMANCE,
        "",
        "With a GPU this measures",
        *(f"  {name:<10} {value}" for name, value in options.items()),
        "in GPU time with its share of the floor, latency, host time and memory.",
        "",
        f"Here, {count} benchmarks ran on {', '.join(chosen(config, 'shapes'))}, to",
        "show that the harness works. Left out:",
        *(f"  {reason}" for reason in reasons),
    ]

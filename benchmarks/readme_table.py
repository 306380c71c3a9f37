"""The README's table of the stage shapes, from the folder of a report or its ``report.json``::

    python -m benchmarks.readme_table bench_out/report

Prints Markdown: facts, one line per shape, and the targets with their verdicts. Prints that nothing
was measured yet where the folder holds no GPU times.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import plot, targets
from benchmarks.ceilings import describe
from benchmarks.gpu_report import all_rows
from benchmarks.recorder import Recorder
from benchmarks.summary import best_torch, geometric_mean

COMMAND = "python -m benchmarks.gpu_report --out FOLDER"
NOTHING = f"Not yet measured on a GPU; `{COMMAND}` does that."
PASSES = {"inference": "forward", "fwd+bwd": "forward + backward"}
FACTS = ("gpu", "commit", "torch", "triton", "driver_version")


def readme_table(report: Path) -> str:
    """Markdown for the results of a report, bf16 and channels_last.

    Args:
        report: the ``--out`` of :mod:`benchmarks.gpu_report`, or the ``report.json`` in it. The
            targets are judged by all of the folder's results; without them by the stages alone.

    Raises:
        ValueError: if there is no such file or folder, or it is not one of
            :mod:`benchmarks.gpu_report`.
    """
    if not report.exists():
        raise ValueError(f"report: expected a folder or a file, found nothing at {report}")
    source = report / "report.json" if report.is_dir() else report
    if not source.exists():
        return NOTHING
    try:
        run = plot.load(source)
    except plot.NothingMeasuredError:
        return NOTHING
    facts = ", ".join(f"{key} {run.environment[key]}" for key in FACTS if key in run.environment)
    lines = [f"Measured by `{COMMAND}`: {facts}; {describe(run.ceilings)}.", ""]
    series = run.series()
    by_pass = {
        pass_: plot.by_shape(series.get((pass_, "bf16", "channels_last"), [])) for pass_ in PASSES
    }
    titles = [
        f"{title}{column}"
        for title in PASSES.values()
        for column in (", us", ": of the floor", ": over best torch")
    ]
    lines += [f"| [B, C, H, W] | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    sizes = {
        name: next(iter(providers.values()))["size"]
        for shapes in by_pass.values()
        for name, providers in shapes.items()
    }
    for name, size in sizes.items():
        cells = [text for shapes in by_pass.values() for text in _cells(shapes.get(name, {}))]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    means = [text for shapes in by_pass.values() for text in _means(shapes)]
    lines.append(f"| geometric mean | {' | '.join(means)} |")
    recorder = Recorder(source.parent)
    judged = targets.verdicts(all_rows(recorder) or run.rows, recorder.result)
    return "\n".join([*lines, "", *targets.markdown(judged)])


def _cells(providers: dict[str, dict[str, Any]]) -> list[str]:
    """Time, share of the floor, and how much longer the fastest of plain torch takes."""
    fused = providers.get("fused")
    if fused is None:
        return ["-"] * 3
    best = best_torch({name: row["gpu_us"] for name, row in providers.items()})
    ratio = f"{best[1] / fused['gpu_us']:.2f}x ({best[0]})" if best else "-"
    return [f"{fused['gpu_us']:.1f}", f"{fused['share_of_floor']:.0%}", ratio]


def _means(shapes: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    fused = [providers["fused"] for providers in shapes.values() if "fused" in providers]
    ratios = [row["over_best_torch"] for row in fused if row.get("over_best_torch")]
    shares = [row["share_of_floor"] for row in fused]
    share = f"{geometric_mean(shares):.0%}" if shares else "-"
    return ["", share, f"{geometric_mean(ratios):.2f}x" if ratios else "-"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "report", type=Path, help="the --out of benchmarks.gpu_report, or the report.json in it"
    )
    arguments = parser.parse_args()
    try:
        print(readme_table(arguments.report))
    except ValueError as reason:
        raise SystemExit(str(reason)) from None


if __name__ == "__main__":
    main()

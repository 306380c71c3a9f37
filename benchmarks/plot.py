"""Picture and Markdown table from the JSON of a run::

    pytest benchmarks --benchmark-only --benchmark-json=bench_out/run.json
    python -m benchmarks.plot bench_out/run.json bench_out

Writes ``share_of_floor.png`` and ``table.md`` into the folder. A run without a GPU has nothing to
plot: it says so and writes nothing.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import NothingMeasuredError, Report, by_shape, load, tables
from smlp.machine import in_words

# Okabe and Ito's palette, told apart with any colour vision; the fused block is the bar.
STYLES = {
    "eager_nchw": ("#999999", "v"),
    "eager_nhwc": ("#56B4E9", "o"),
    "compiled": ("#E69F00", "s"),
    "handwritten": ("#009E73", "^"),
    "handwritten_compiled": ("#CC79A7", "D"),
}
FUSED_COLOUR = "#0072B2"


def draw(report: Report, path: Path) -> None:
    """One row of panels per pass, dtype and layout: share of floor, and time over fused time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = report.series()
    figure, axes = plt.subplots(
        len(series), 2, figsize=(13, 0.6 + 3.4 * len(series)), squeeze=False, layout="constrained"
    )
    for (key, rows), (left, right) in zip(series.items(), axes, strict=True):
        shapes, title = by_shape(rows), ", ".join(key)
        shares = [
            {n: 100 * row["share_of_floor"] for n, row in of.items()} for of in shapes.values()
        ]
        heights = [of.get("fused", 0) for of in shares]
        bars = left.bar(
            range(len(shapes)), heights, width=0.62, color=FUSED_COLOUR, label="fused", zorder=2
        )
        left.bar_label(bars, [f"{height:.0f}" if height else "" for height in heights], fontsize=8)
        _panel(left, shapes, shares)
        left.set(title=f"{title}: share of the floor", ylabel="% of floor (higher is better)")
        left.set_ylim(0, 100)
        ratios = [
            {n: row["gpu_us"] / of["fused"]["gpu_us"] for n, row in of.items() if "fused" in of}
            for of in shapes.values()
        ]
        _panel(right, shapes, ratios)
        right.set(title=f"{title}: time over the fused block's", ylabel="x (fused = 1)")
        right.axhline(1, color=FUSED_COLOUR, linewidth=1.2)
        right.set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    facts = in_words(report.environment, ("commit", "torch", "triton"))
    figure.suptitle(f"sMLP block on {report.ceilings.device}, {facts}", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, shapes: Iterable[str], numbers: Sequence[Mapping[str, float]]) -> None:
    """PyTorch's numbers, by provider, of each shape."""
    for index, (name, (colour, marker)) in enumerate(STYLES.items()):
        offset = 0.1 * (index - (len(STYLES) - 1) / 2)  # markers of equal height stay visible
        points = [(at + offset, of[name]) for at, of in enumerate(numbers) if name in of]
        if points:
            axis.plot(
                *zip(*points, strict=True),
                linestyle="none",
                marker=marker,
                markersize=6,
                color=colour,
                markeredgecolor="white",
                markeredgewidth=0.6,
                label=name,
                zorder=3,
            )
    axis.set_xticks(range(len(numbers)), shapes, rotation=40, ha="right", fontsize=8)
    axis.grid(axis="y", color="#e0e0e0", linewidth=0.8, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def write(source: Path, folder: Path) -> list[Path]:
    """Make both files from ``source`` in ``folder``; returns their paths."""
    report = load(source)
    folder.mkdir(parents=True, exist_ok=True)
    picture, table = folder / "share_of_floor.png", folder / "table.md"
    draw(report, picture)
    head = report.source("pytest benchmarks --benchmark-only")
    table.write_text("\n".join([head, "", *tables(report.series())]))
    return [picture, table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="written by --benchmark-json")
    parser.add_argument("out_dir", type=Path, help="where the picture and the table go")
    arguments = parser.parse_args()
    try:
        written = write(arguments.json, arguments.out_dir)
    except NothingMeasuredError as reason:
        print(reason)  # the expected end of a rehearsal, not a failure
        written = []
    except ValueError as reason:
        raise SystemExit(str(reason)) from None
    print("written:", arguments.json, *written)


if __name__ == "__main__":
    main()

"""Picture and Markdown table from the JSON of a run::

    pytest benchmarks --benchmark-only --benchmark-json=bench_out/run.json
    python -m benchmarks.plot bench_out/run.json bench_out

Writes ``share_of_floor.png`` and ``table.md`` into the folder. A run without a GPU has nothing to
plot: it says so and writes nothing.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.report import NothingMeasuredError, Report, by_shape, load, tables

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
        shapes = by_shape(rows)
        title = ", ".join(key)
        _panel(left, shapes, "share_of_floor", lambda row, _: 100 * row["share_of_floor"])
        left.set(title=f"{title}: share of the floor", ylabel="% of floor (higher is better)")
        left.set_ylim(0, 100)
        _panel(right, shapes, "ratio", lambda row, fused: row["gpu_us"] / fused["gpu_us"])
        right.set(title=f"{title}: time over the fused block's", ylabel="x (fused = 1)")
        right.axhline(1, color=FUSED_COLOUR, linewidth=1.2)
        right.set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    environment = report.environment
    figure.suptitle(
        f"sMLP block on {report.ceilings.device}, commit {environment.get('commit', 'unknown')}, "
        f"torch {environment.get('torch', '?')}, triton {environment.get('triton', '?')}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, shapes: dict[str, dict[str, dict[str, Any]]], kind: str, value: Any) -> None:
    positions = range(len(shapes))
    if kind == "share_of_floor":
        bars = [value(p["fused"], None) if "fused" in p else 0 for p in shapes.values()]
        axis.bar(positions, bars, width=0.62, color=FUSED_COLOUR, label="fused", zorder=2)
        for position, height in zip(positions, bars, strict=True):
            if height:
                axis.annotate(
                    f"{height:.0f}", (position, height), ha="center", va="bottom", fontsize=8
                )
    for index, (name, (colour, marker)) in enumerate(STYLES.items()):
        offset = 0.1 * (index - (len(STYLES) - 1) / 2)  # markers of equal height stay visible
        points = [
            (position + offset, value(p[name], p.get("fused")))
            for position, p in zip(positions, shapes.values(), strict=True)
            if name in p and (kind == "share_of_floor" or "fused" in p)
        ]
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
    axis.set_xticks(list(positions), list(shapes), rotation=40, ha="right", fontsize=8)
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

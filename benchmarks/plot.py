"""Picture and Markdown table from the JSON of a run::

    pytest benchmarks --benchmark-only --benchmark-json=bench_out/run.json
    python -m benchmarks.plot bench_out/run.json bench_out

Writes ``share_of_floor.png`` and ``table.md`` into the folder. A run without a GPU has nothing to
plot: it says so and writes nothing.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ceilings import describe
from benchmarks.roofline import PASSES, Ceilings
from benchmarks.shapes import BY_NAME
from benchmarks.summary import best_torch, geometric_mean

# Okabe and Ito's palette, told apart with any colour vision; the fused block is the bar.
STYLES = {
    "eager_nchw": ("#999999", "v"),
    "eager_nhwc": ("#56B4E9", "o"),
    "compiled": ("#E69F00", "s"),
    "handwritten": ("#009E73", "^"),
    "handwritten_compiled": ("#CC79A7", "D"),
}
FUSED_COLOUR = "#0072B2"
DISTINGUISHING = ("pass", "dtype", "layout")


class NothingMeasuredError(ValueError):
    """The run was made without a GPU."""


@dataclass(frozen=True)
class Run:
    """What was measured, on what.

    Attributes:
        rows: one mapping per benchmark, as in pytest-benchmark's ``extra_info``.
        ceilings: the rates the floors were computed with.
        environment: flat facts about device, versions and commit.
    """

    rows: list[dict[str, Any]]
    ceilings: Ceilings
    environment: dict[str, Any]

    def series(self) -> dict[tuple[str, ...], list[dict[str, Any]]]:
        """Rows by (pass, dtype, layout), in the order of the passes."""
        found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in sorted(self.rows, key=lambda row: PASSES.index(row["pass"])):
            found.setdefault(tuple(row[key] for key in DISTINGUISHING), []).append(row)
        return found


def load(path: Path) -> Run:
    """Read the JSON of ``pytest benchmarks`` or of ``benchmarks.gpu_report``.

    Raises:
        ValueError: if the file is neither.
        NothingMeasuredError: if it holds no GPU times.
    """
    data = json.loads(path.read_text())
    if "benchmarks" in data:
        rows = [entry["extra_info"] for entry in data["benchmarks"]]
        environment = data.get("machine_info", {}).get("smlp", {})
    elif "rows" in data:
        rows, environment = data["rows"], data.get("environment", {})
    else:
        raise ValueError(f"{path}: expected a JSON of pytest benchmarks or of gpu_report")
    rows = [row for row in rows if row.get("gpu_us") is not None]
    if not rows or not data.get("ceilings"):
        raise NothingMeasuredError(f"{path}: nothing to plot, no GPU times in it.")
    return Run(rows, Ceilings(**data["ceilings"]), environment)


def by_shape(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """``{shape: {provider: row}}``, stage shapes by model and from large images to small."""
    names = {row["shape"]: None for row in rows}
    ordered = sorted(names, key=lambda name: (_model(name), -BY_NAME[name].pixels))
    return {
        name: {row["provider"]: row for row in rows if row["shape"] == name} for name in ordered
    }


def _model(name: str) -> tuple[int, str]:
    model = name.partition("-")[0]
    models = ("tiny", "small", "base")
    return (models.index(model), model) if model in models else (len(models), model)


def markdown(run: Run, command: str) -> str:
    """One table per pass, dtype and layout, under the facts needed to judge and repeat it."""
    facts = ", ".join(f"{key} {value}" for key, value in run.environment.items())
    lines = [f"Measured by `{command}`; {facts}; {describe(run.ceilings)}.", ""]
    for (pass_, dtype, layout), rows in run.series().items():
        lines += [
            f"**{pass_}, {dtype}, {layout}** (GPU microseconds, medians)",
            "",
            "| shape [B, C, H, W] | floor | fused | share of floor | best torch | faster by |",
            "|---|---|---|---|---|---|",
        ]
        shares, ratios = [], []
        for name, providers in by_shape(rows).items():
            fused, size = providers.get("fused"), next(iter(providers.values()))["size"]
            best = best_torch({key: row["gpu_us"] for key, row in providers.items()})
            floor = next(iter(providers.values()))["floor_us"]
            cells = [f"{name} {size}", f"{floor:.1f}"]
            cells += [f"{fused['gpu_us']:.1f}", f"{fused['share_of_floor']:.0%}"] if fused else "--"
            cells += [f"{best[1]:.1f} ({best[0]})"] if best else "-"
            cells += [f"{best[1] / fused['gpu_us']:.2f}x"] if fused and best else "-"
            lines.append(f"| {' | '.join(cells)} |")
            if fused:
                shares.append(fused["share_of_floor"])
            if fused and best:
                ratios.append(best[1] / fused["gpu_us"])
        lines += ["", *_aggregates(shares, ratios), ""]
    return "\n".join(lines)


def _aggregates(shares: Sequence[float], ratios: Sequence[float]) -> list[str]:
    parts = []
    if shares:
        parts.append(f"share of floor {geometric_mean(shares):.0%} (worst {min(shares):.0%})")
    if ratios:
        parts.append(f"over best torch {geometric_mean(ratios):.2f}x (worst {min(ratios):.2f}x)")
    return [f"Geometric means: {', '.join(parts)}."] if parts else []


def draw(run: Run, path: Path) -> None:
    """One row of panels per pass, dtype and layout: share of floor, and time over fused time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = run.series()
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
    environment = run.environment
    figure.suptitle(
        f"sMLP block on {run.ceilings.device}, commit {environment.get('commit', 'unknown')}, "
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


def write(source: Path, folder: Path, command: str) -> list[Path]:
    """Make both files from ``source`` in ``folder``; returns their paths."""
    run = load(source)
    folder.mkdir(parents=True, exist_ok=True)
    picture, table = folder / "share_of_floor.png", folder / "table.md"
    draw(run, picture)
    table.write_text(markdown(run, command))
    return [picture, table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="written by --benchmark-json or gpu_report")
    parser.add_argument("out_dir", type=Path, help="where the picture and the table go")
    arguments = parser.parse_args()
    try:
        paths = write(arguments.json, arguments.out_dir, "pytest benchmarks --benchmark-only")
    except NothingMeasuredError as reason:
        print(reason)  # the expected end of a rehearsal, not a failure
    except ValueError as reason:
        raise SystemExit(str(reason)) from None
    else:
        print("wrote", *paths)


if __name__ == "__main__":
    main()

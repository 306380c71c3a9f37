"""Rows of measurements as tables, Markdown that reads well as plain text, and as a picture."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.providers import PROVIDERS
from benchmarks.roofline import PASSES
from benchmarks.shapes import BY_NAME, STAGES
from smlp.tables import markdown_table

Row = dict[str, Any]  # made by bench_block.row

SERIES = ("pass", "dtype", "layout")  # rows that share them, and are stages or not, make a table
FACTS = ("gpu", "commit", "torch", "triton", "driver_version")  # next to every number
QUANTITIES = {
    "gpu_us": "GPU microseconds",
    "host_us": "host microseconds",
    "peak_mb": "peak memory beyond the inputs, MB",
    "kept_mb": "memory kept for the backward, MB",
}

# Okabe and Ito's palette, told apart with any colour vision
COLOURS = {
    "eager_nchw": "#999999",
    "eager_nhwc": "#56B4E9",
    "compiled": "#E69F00",
    "handwritten": "#009E73",
    "handwritten_compiled": "#CC79A7",
    "fused": "#0072B2",
}


def series(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by pass, dtype and layout, in the order of the passes, the stages apart from others."""
    stages = {shape.name for shape in STAGES}
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: PASSES.index(row["pass"])):
        others = [] if row["shape"] in stages else ["other shapes"]
        found.setdefault(", ".join([*(row[key] for key in SERIES), *others]), []).append(row)
    return found


def by_shape(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """``{shape: {provider: row}}``, shapes in the order in which they are declared."""
    order, found = list(BY_NAME), dict[str, dict[str, Row]]()
    for row in sorted(rows, key=lambda row: order.index(row["shape"])):
        found.setdefault(row["shape"], {})[row["provider"]] = row
    return found


def best_torch(measured: Mapping[str, Row]) -> Row | None:
    """The fastest provider that is plain torch; None if none was measured."""
    of_torch = [row for name, row in measured.items() if name != "fused"]
    return min(of_torch, key=lambda row: row["gpu_us"], default=None)


def tables(rows: Iterable[Row], quantity: str = "gpu_us") -> list[str]:
    """One table per pass, dtype and layout: shapes as rows, providers as columns.

    Args:
        rows: with a GPU time.
        quantity: one of QUANTITIES; only columns that hold something are shown.
    """
    text = []
    for title, part in series(row for row in rows if row.get(quantity)).items():
        spread = max(row.get("spread") or 0.0 for row in part)
        noise = f"; samples spread by {spread:.1%} at most" if quantity == "gpu_us" else ""
        text += [f"**{title}** ({QUANTITIES[quantity]}{noise})", "", *_table(part, quantity), ""]
    return text


def _table(rows: Sequence[Row], quantity: str) -> list[str]:
    present = {row["provider"] for row in rows}
    names = [name for name in PROVIDERS if name in present]
    cells = [["[B, C, H, W]", *names, "floor", "fused: of floor", "best torch / fused"]]
    shares, ratios = [], []
    for shape, measured in by_shape(rows).items():
        first, fused, best = next(iter(measured.values())), measured.get("fused"), None
        numbers = (f"{measured[name][quantity]:.1f}" if name in measured else "-" for name in names)
        cells.append([f"{shape} {first['size']}", *numbers, "-", "-", "-"])
        if quantity == "gpu_us":
            best, cells[-1][-3] = best_torch(measured), f"{first['floor_us']:.1f}"
            if fused:
                shares.append(fused["share_of_floor"])
                cells[-1][-2] = f"{shares[-1]:.0%}"
        if fused and best:
            ratios.append(best["gpu_us"] / fused["gpu_us"])
            cells[-1][-1] = f"{ratios[-1]:.2f}x ({best['provider']})"
    if shares:
        mean = f"{geometric_mean(shares):.0%}, {min(shares):.0%}"
        ratio = f"{geometric_mean(ratios):.2f}x, {min(ratios):.2f}x" if ratios else "-"
        cells.append(["geometric mean, worst", *[""] * len(names), "", mean, ratio])
    filled = [column for column in zip(*cells, strict=True) if set(column[1:]) - {"", "-"}]
    head, *lines = zip(*filled, strict=True)
    return markdown_table(head, lines)


def draw(rows: Iterable[Row], title: str, path: Path) -> None:
    """A panel for each table: the share of the floor that each provider reaches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = series(rows)
    figure, axes = plt.subplots(
        len(panels), figsize=(12, 1 + 3 * len(panels)), squeeze=False, layout="constrained"
    )
    for (name_of_panel, part), axis in zip(panels.items(), axes.flat, strict=True):
        shapes = by_shape(part)
        names = [name for name in COLOURS if any(name in of for of in shapes.values())]
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            at = [place + (index - (len(names) - 1) / 2) * width for place in range(len(shapes))]
            shares = [
                100 * of[name]["share_of_floor"] if name in of else 0 for of in shapes.values()
            ]
            axis.bar(at, shares, width, color=COLOURS[name], label=name, zorder=2)
        axis.set(title=name_of_panel, ylabel="% of the floor")
        axis.set_xticks(range(len(shapes)), shapes)
        axis.grid(axis="y", color="#e0e0e0", zorder=0)
        axis.legend(loc="upper left", ncols=len(names), frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(folder: Path, text: Iterable[str], rows: Sequence[Row], title: str) -> list[Path]:
    """Write ``report.md`` and, of rows with a GPU time, ``share_of_floor.png``; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "report.md", folder / "share_of_floor.png"
    page.write_text("\n".join(text) + "\n")
    if not rows:
        return [page]
    try:
        draw(rows, title, picture)
    except ImportError as error:
        print(f"no picture: {error}")
        return [page]
    return [page, picture]

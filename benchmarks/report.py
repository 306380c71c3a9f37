"""Measurements as tables: for the terminal, the report's page and the README.

A table is Markdown whose columns line up, so that it reads well as plain text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.providers import PROVIDERS
from benchmarks.roofline import PASSES, Ceilings
from benchmarks.rows import best_torch
from benchmarks.shapes import BY_NAME
from smlp.machine import in_words
from smlp.tables import markdown_table

COMMAND = "make gpu-day"
NOTHING = f"Not yet measured on a GPU; `{COMMAND}` does that."
FACTS = ("gpu", "commit", "torch", "triton", "driver_version")
ROW_KEYS = ("pass", "dtype", "layout")  # rows that share them stand in one table
README_TABLES = (("inference", "bf16", "channels_last"), ("fwd+bwd", "bf16", "channels_last"))
MODELS = ("tiny", "small", "base")


class NothingMeasuredError(ValueError):
    """The run was made without a GPU."""


@dataclass(frozen=True)
class Report:
    """Measured rows, and the machine they were measured on.

    Attributes:
        rows: as made by :func:`benchmarks.rows.make_row`, all of them with a GPU time.
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
            found.setdefault(tuple(row[key] for key in ROW_KEYS), []).append(row)
        return found

    def source(self, command: str) -> str:
        """The command, the machine and the ceilings, in a sentence."""
        facts = in_words(self.environment, FACTS)
        return f"Measured by `{command}`: {facts}; {self.ceilings}."


def load(path: Path) -> Report:
    """Read what ``pytest benchmarks --benchmark-json=path`` wrote.

    Raises:
        ValueError: if the file is something else.
        NothingMeasuredError: if it holds no GPU times.
    """
    data = json.loads(path.read_text())
    if "benchmarks" not in data:
        raise ValueError(f"{path}: expected the JSON of pytest benchmarks")
    rows = [entry["extra_info"] for entry in data["benchmarks"]]
    rows = [row for row in rows if row.get("gpu_us") is not None]
    if not rows or not data.get("ceilings"):
        raise NothingMeasuredError(f"{path}: nothing to plot, no GPU times in it.")
    return Report(rows, Ceilings(**data["ceilings"]), data.get("machine_info", {}).get("smlp", {}))


def by_shape(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """``{shape: {provider: row}}``, stage shapes by model and from large images to small."""

    def place(name: str) -> tuple[int, str, int]:
        model = name.partition("-")[0]
        return (*MODELS, model).index(model), model, -BY_NAME[name].pixels

    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: place(row["shape"])):
        found.setdefault(row["shape"], {})[row["provider"]] = row
    return found


def tables(series: dict[tuple[str, ...], list[dict[str, Any]]]) -> list[str]:
    """One table per pass, dtype and layout: shapes as rows, providers as columns."""
    text = []
    for key, rows in series.items():
        text += [f"**{', '.join(key)}** (GPU microseconds{_noise(rows)})", ""]
        text += [*_table(rows), ""]
    return text


def _noise(rows: Sequence[dict[str, Any]]) -> str:
    again = [abs(row["noise"]) for row in rows if row.get("noise") is not None]
    return f"; measured twice, one provider differs by {max(again):.1%}" if again else ""


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    present = {row["provider"] for row in rows}
    names = [name for name in PROVIDERS if name in present]
    cells = [["[B, C, H, W]", *names, "floor", "fused: of floor", "best torch / fused"]]
    shares, ratios = [], []
    for shape, measured in by_shape(rows).items():
        any_row, fused = next(iter(measured.values())), measured.get("fused")
        best = best_torch({name: row["gpu_us"] for name, row in measured.items()})
        times = (f"{measured[name]['gpu_us']:.1f}" if name in measured else "-" for name in names)
        size, floor = f"{shape} {any_row['size']}", f"{any_row['floor_us']:.1f}"
        cells.append([size, *times, floor, "-", "-"])
        if fused:
            shares.append(fused["share_of_floor"])
            cells[-1][-2] = f"{shares[-1]:.0%}"
        if fused and best:
            ratios.append(best[1] / fused["gpu_us"])
            cells[-1][-1] = f"{ratios[-1]:.2f}x ({best[0]})"
    if shares:
        mean = f"{geometric_mean(shares):.0%}, {min(shares):.0%}"
        ratio = f"{geometric_mean(ratios):.2f}x, {min(ratios):.2f}x" if ratios else "-"
        cells.append(["geometric mean, worst", *[""] * len(names), "", mean, ratio])
    filled = [column for column in zip(*cells, strict=True) if set(column[1:]) - {"", "-"}]
    head, *lines = zip(*filled, strict=True)
    return markdown_table(head, lines)


def readme_text(report: Report, judged: list[str]) -> str:
    """The README's section: the stages in bf16 and channels_last, then the targets.

    Args:
        report: the rows of the stage shapes.
        judged: the table of the targets and their verdicts.
    """
    series = report.series()
    chosen = {key: series[key] for key in README_TABLES if key in series}
    return "\n".join([report.source(COMMAND), "", *tables(chosen), *judged])

"""Derived numbers and the text table of a run."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any


def speedups(gpu_us: Mapping[str, float], name: str) -> dict[str, float]:
    """How many times longer each other provider takes than ``name``."""
    return {other: us / gpu_us[name] for other, us in gpu_us.items() if other != name}


def best_torch(gpu_us: Mapping[str, float]) -> tuple[str, float] | None:
    """The fastest provider that is plain torch, with its time; None if none was measured."""
    of_torch = {name: us for name, us in gpu_us.items() if name != "fused"}
    return min(of_torch.items(), key=lambda item: item[1], default=None)


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers.

    Raises:
        ValueError: for an empty sequence or a value that is not positive.
    """
    if not values or min(values) <= 0:
        raise ValueError(f"values: expected at least one, all positive, got {list(values)}")
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("provider", "provider", "<22"),
    ("GPU us", "gpu_us", ">9.1f"),
    ("of floor", "share_of_floor", ">8.0%"),
    ("best torch / this", "over_best_torch", ">17.2f"),
    ("again", "noise", ">+7.1%"),
    ("wall us", "wall_us", ">9.1f"),
    ("host us", "host_us", ">8.1f"),
    ("peak MB", "peak_mb", ">8.1f"),
    ("kept MB", "kept_mb", ">8.1f"),
)


def summary_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The rows as one table per group (everything but the provider); "-" for not measured."""
    head = " ".join(f"{title:{_width(spec)}}" for title, _, spec in COLUMNS)
    lines = []
    for group, members in groupby(rows, key=lambda row: row["group"]):
        lines += ["", group, head]
        lines += [
            " ".join(_cell(row.get(key), spec) for _, key, spec in COLUMNS) for row in members
        ]
    return lines


def _cell(value: Any, spec: str) -> str:
    return f"{'-':{_width(spec)}}" if value is None else f"{value:{spec}}"


def _width(spec: str) -> str:
    return spec.replace("+", "").partition(".")[0].rstrip("%f")

"""The log of a run: CSV files that a continuation extends, and TensorBoard if it is installed."""

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from smlp.files import naming, write_atomically

FILES = ("log.csv", "epochs.csv")  # steps, epochs
STEP_COLUMNS = ("step", "epoch", "lr", "loss")
_HELD_OUT = ("loss", "accuracy", "ema_loss", "ema_accuracy")
EPOCH_COLUMNS = ("epoch", "step", "train_loss", *_HELD_OUT, "seconds")


class Table:
    """A CSV file that rows are added to.

    Args:
        path: the file; rows beyond ``last_step`` that are already in it are dropped, because the
            run continues from that step and will write them again.
        columns: the header; one of the columns is ``step``.
        last_step: how many steps the run has behind it.
    """

    def __init__(self, path: Path, columns: Sequence[str], last_step: int) -> None:
        kept: list[dict[str, Any]] = []
        if last_step and path.exists():
            with path.open(newline="") as file:
                # A kill can leave half a row at the end; it is always beyond the checkpoint.
                kept = [row for row in csv.DictReader(file) if _step(row) <= last_step]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, text.getvalue().encode())
        self._path, self._columns = path, columns

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append ``rows`` and leave the file complete on disk.

        Raises:
            OSError: naming the file, if that fails.
        """
        with naming(self._path), self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerows(rows)


def written(folder: Path) -> list[str]:
    """Return which of ``FILES`` in ``folder`` have rows."""
    paths = [folder / name for name in FILES if (folder / name).exists()]
    return [path.name for path in paths if len(path.read_text().splitlines()) > 1]


def _step(row: dict[str, Any]) -> float:
    try:
        return int(row["step"])
    except (TypeError, ValueError):
        return float("inf")


class Log:
    """Everything that one run writes down; only the main process has one.

    Args:
        folder: where ``log.csv`` (steps) and ``epochs.csv`` go, and TensorBoard's events.
        last_step: how many steps the run has behind it.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        self._steps, self._epochs = (
            Table(folder / name, columns, last_step)
            for name, columns in zip(FILES, (STEP_COLUMNS, EPOCH_COLUMNS), strict=True)
        )
        self._events = _tensorboard(folder, last_step)

    def steps(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write down finished steps: the values of ``STEP_COLUMNS``."""
        self._steps.add(rows)
        if self._events is not None:
            for row in rows:
                self._events.add_scalar("train/loss", row["loss"], row["step"])
                self._events.add_scalar("train/lr", row["lr"], row["step"])

    def epoch(self, row: dict[str, Any]) -> None:
        """Write down a finished epoch: the values of ``EPOCH_COLUMNS``."""
        self._epochs.add([row])
        if self._events is not None:
            for name in _HELD_OUT:
                if row.get(name) is not None:
                    self._events.add_scalar(f"held_out/{name}", row[name], row["step"])

    def close(self) -> None:
        """Flush what is still in memory."""
        if self._events is not None:
            self._events.close()


def _tensorboard(folder: Path, last_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)


def progress(steps: Iterable[Any], *, total: int, title: str, show: bool) -> Iterator[Any]:
    """Pass ``steps`` through a progress bar on standard error, if that is a terminal.

    There is no bar if ``show`` is off or tqdm is not installed.
    """
    if show and sys.stderr.isatty():
        with suppress(ImportError):
            from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

            bar = {"total": total, "desc": title, "unit": "step", "dynamic_ncols": True}
            steps = tqdm(steps, leave=False, **bar)
    yield from steps

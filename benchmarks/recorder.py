"""Runs measurements one by one within a time budget and writes each result down at once.

A run that stops, for whatever reason, loses nothing that was finished: the next call with the same
folder repeats only what is not ``measured`` yet.
"""

import json
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks import environment
from benchmarks.roofline import Ceilings
from smlp.files import write_atomically

RESULTS = "results.json"
LEAST_SECONDS = 5.0  # with less left than this nothing more is started
CHILD_MARGIN = 2.0  # seconds to end a child and read what it printed


class SkippedError(Exception):
    """The measurement cannot be made here; the message says why."""


class OutOfTimeError(BaseException):
    """The budget ended while a measurement ran.

    No Exception, so that code that turns any failure into a fallback lets it through.
    """


class DeviceLostError(Exception):
    """The process can no longer use the GPU: a kernel made an illegal access, or the like."""


@dataclass
class Context:
    """The time and the ceilings that a measurement may use.

    Attributes:
        deadline: ``time.monotonic()`` at which the run has to end.
        ceilings: measured in this process before anything else; None without a GPU.
        so_far: what the running measurement has; it fills this as it goes, so that one that is cut
            off leaves what it had.
    """

    deadline: float
    ceilings: Ceilings | None = None
    so_far: dict[str, Any] = field(default_factory=dict)
    _stop_at: float = math.inf

    def begin(self, seconds: float) -> float:
        """Start a measurement of at most ``seconds``; returns how many it really has."""
        self.so_far = {}
        seconds = min(seconds, self.remaining())
        self._stop_at = time.monotonic() + seconds
        return seconds

    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def child_seconds(self) -> float:
        """Seconds for a child, so that its output is read before the measurement is stopped."""
        end = min(self.deadline, self._stop_at)
        return max(1.0, end - CHILD_MARGIN - time.monotonic())

    def measured_ceilings(self) -> Ceilings:
        """The ceilings, or SkippedError where there are none to compare with."""
        if self.ceilings is None:
            raise SkippedError("no ceilings were measured in this run")
        return self.ceilings


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Attributes:
        name: what it is recorded by.
        run: returns what goes into the JSON.
        needs_gpu: skip it where there is none.
        seconds: stop it after that, so that one that hangs does not cost the others their time.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    needs_gpu: bool = True
    seconds: float = 60.0


@dataclass
class Recorder:
    """The results of a folder, in ``results.json``.

    Every entry has ``status`` (measured, skipped, failed or unfinished), ``seconds`` and ``when``;
    if measured ``result``, else ``reason`` and, where there is any, what it had ``so_far``. Either
    comes with ``environment`` and ``ceilings``.
    """

    folder: Path
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / RESULTS
        if self.path.exists():
            self.entries = json.loads(self.path.read_text())["measurements"]

    def measured(self, name: str) -> bool:
        return self.entries.get(name, {}).get("status") == "measured"

    def result(self, name: str) -> dict[str, Any] | None:
        """Return what ``name`` returned, or None if it is not measured."""
        return self.entries[name]["result"] if self.measured(name) else None

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of all measurements, also of those that were cut off."""
        for entry in self.entries.values():
            yield from (entry.get("result") or entry.get("so_far") or {}).get("rows", [])

    def run(
        self,
        measurements: Sequence[Measurement],
        context: Context,
        say: Callable[[str], object] = print,
        *,
        retry: bool = True,
    ) -> bool:
        """Run what is not measured yet, until done or out of time; returns whether all were tried.

        A measurement that fails or has to be skipped does not stop the others.

        Args:
            measurements: in this order, but what was never tried first.
            context: what they may use.
            say: takes a line about each.
            retry: also run what was recorded as failed, skipped or unfinished.

        Raises:
            DeviceLostError: if no other measurement could succeed in this process. What failed is
                recorded; a new process continues with ``retry=False``.
        """
        facts = environment.describe()  # once: nvidia-smi takes its time
        for measurement in sorted(measurements, key=lambda one: one.name in self.entries):
            if self.measured(measurement.name):
                say(f"{measurement.name}: measured before")
                continue
            if not retry and measurement.name in self.entries:
                continue
            if context.remaining() < LEAST_SECONDS:
                say("out of time; call again with the same folder to continue")
                return False
            # should the process end meanwhile, the next one begins with the others
            self.entries[measurement.name] = {
                "status": "unfinished",
                "seconds": 0.0,
                "reason": "the process ended while it ran",
            }
            self._save()
            entry = self._attempt(measurement, context, facts)
            self.entries[measurement.name] = entry
            self._save()
            reason = f": {entry['reason']}" if "reason" in entry else ""
            say(f"{measurement.name}: {entry['status']} in {entry['seconds']:.1f} s{reason}")
            for line in details(entry):
                say(f"  {line}")
            if torch.cuda.is_available() and not device_usable():
                raise DeviceLostError(measurement.name)
        return True

    def _attempt(
        self, measurement: Measurement, context: Context, facts: dict[str, Any]
    ) -> dict[str, Any]:
        start = time.monotonic()
        outcome: dict[str, Any]
        try:
            if measurement.needs_gpu and not torch.cuda.is_available():
                raise SkippedError("needs an NVIDIA GPU: torch.cuda.is_available() is False here")
            with time_limit(context.begin(measurement.seconds)):
                result = measurement.run(context)
            outcome = {"status": "measured", "result": result}
        except SkippedError as reason:
            outcome = {"status": "skipped", "reason": str(reason)}
        except OutOfTimeError as reason:
            outcome = {"status": "unfinished", "reason": str(reason)}
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            outcome = {
                "status": "failed",
                "reason": f"{type(error).__name__}: {first_line}",
                "traceback": traceback.format_exc(),
            }
        if outcome["status"] in ("unfinished", "failed") and context.so_far:
            outcome["so_far"] = context.so_far
        if outcome.keys() & {"result", "so_far"}:
            outcome["environment"] = facts
            outcome["ceilings"] = asdict(context.ceilings) if context.ceilings else None
        return {
            **outcome,
            "seconds": time.monotonic() - start,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _save(self) -> None:
        text = json.dumps({"measurements": self.entries}, indent=1) + "\n"
        write_atomically(self.path, text.encode())


def details(entry: dict[str, Any]) -> Iterator[str]:
    """Lines on what failed or was skipped inside a measurement, and on what a cut-off one had."""
    for part, why in entry.get("result", {}).get("failures", {}).items():
        yield f"{part}: {why}"
    for part, why in entry.get("result", {}).get("skips", {}).items():
        yield f"{part}: SKIPPED: {why}"
    if so_far := entry.get("so_far"):
        found = (
            f"{len(value)} {name}" if isinstance(value, list) else f"{name} {json.dumps(value)}"
            for name, value in so_far.items()
        )
        yield f"it had: {', '.join(found)}"


def device_usable() -> bool:
    """Whether the GPU still does what this process asks; an illegal access ends that for good."""
    try:
        return torch.ones(1, device="cuda").item() == 1.0
    except RuntimeError:
        return False


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError inside the block after ``seconds``; for the main thread.

    The alarm is handled between two Python instructions, so a single long call into a library ends
    first.
    """

    def stop(_: int, __: FrameType | None) -> None:
        raise OutOfTimeError(f"stopped after the {seconds:.0f} s that it had")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

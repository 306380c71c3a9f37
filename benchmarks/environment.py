"""The machine and the commit that a number was measured on."""

import os
import subprocess
from pathlib import Path

from smlp import machine

ROOT = Path(__file__).resolve().parent.parent
NOT_PERFORMANCE = "NO NVIDIA GPU HERE: nothing was measured. These are NOT performance results."


def describe() -> machine.Facts:
    """:func:`smlp.machine.describe` and the commit, for the head of a table and for JSON."""
    return {"commit": commit(), **machine.describe()}


def commit() -> str:
    """Short hash of the checkout, with ``+`` if tracked files differ from it.

    ``SMLP_COMMIT``, where it is set, comes first: the code may have been copied without its git
    directory, or next to that of another commit. Without either it is ``unknown``.
    """
    if told := os.environ.get("SMLP_COMMIT"):
        return told
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=9", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()

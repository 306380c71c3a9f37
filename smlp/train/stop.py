"""Ctrl-C and SIGTERM: a run that is asked to stop saves first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop; the message says by which signal, and how to continue."""


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Collect the names of signals that ask the process to stop; the second one acts as usual.

    Handlers can be set in the main thread only; elsewhere the list stays empty.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}
    # A shell makes what it runs in the background ignore Ctrl-C.
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        restore()

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()

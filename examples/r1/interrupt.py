"""Ctrl-C and `kill`: the first lets the step end and a checkpoint be written, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_PRESS = 1.0  # seconds in which further signals say the same: the terminal and torchrun both tell of one Ctrl-C
_NOTE = b"\nexamples.r1: stops after this step, with a checkpoint; once more to stop at once\n"


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop.

    saved: whether a checkpoint was written for it. False: it was asked twice.
    """

    def __init__(self, number: int = signal.SIGINT, saved: bool = True) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)
        self.saved = saved

    @property
    def exit_code(self) -> int:
        """What a shell reports of a program that the signal ended."""
        return 128 + self.signal


class _Requests:
    """Signals since the handlers were installed."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._since = 0.0

    def take(self, number: int, _frame: FrameType | None) -> None:
        if self.first is None:
            self.first, self._since = number, monotonic()
            if os.environ.get("RANK", "0") == "0":
                with suppress(OSError):
                    os.write(2, _NOTE)  # not through a stream, which may be in the middle of a line just now
        elif monotonic() - self._since >= SAME_PRESS:
            raise Interrupted(number, saved=False)


_requests = _Requests()


@contextmanager
def signals_handled() -> Iterator[None]:
    """SIGINT and SIGTERM ask for a stop after the step; at the end the earlier handlers come back.

    A signal that is ignored, as SIGINT in a shell's background job, stays so. Does nothing outside the main thread,
    where Python has no handlers.
    """
    global _requests
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _requests = _requests, _Requests()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in handlers:
            signal.signal(number, _requests.take)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _requests = before


def stop_requested() -> bool:
    """Whether this process was asked to stop. Several ranks ask each other: they must stop after the same step."""
    return _requests.first is not None


def interrupted() -> Interrupted:
    """What a run raises that was asked to stop and has saved its checkpoint."""
    return Interrupted(signal.SIGINT if _requests.first is None else _requests.first)

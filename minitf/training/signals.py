"""Ctrl-C and a scheduler's SIGTERM: the run ends soon and keeps what it has done."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# torchrun forwards a signal to processes that the scheduler has signalled already: within this time it is the same one.
SAME_SIGNAL_S = 5.0


@contextmanager
def ending_on_signals(stop_soon: Callable[[str], None], several_processes: bool) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM calls `stop_soon` with its name; a second one ends the program."""
    asked_at: float | None = None

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        first = asked_at is None
        now = time.monotonic()
        if first:
            stop_soon(signal.Signals(number).name)
        asked_at = now if asked_at is None else asked_at
        if several_processes and now - asked_at < SAME_SIGNAL_S:
            return
        for kind, handler in before.items():
            signal.signal(kind, handler)
        if not first:
            signal.raise_signal(number)

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        for kind in before:
            signal.signal(kind, on_signal)
    except ValueError:  # outside the main thread signals cannot be handled
        before = {}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)

"""A time limit on a call, kept by an alarm: a reward that waits for a server forever must not hold up all ranks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

RINGS_AGAIN = 1.0
"""Seconds until the alarm rings once more, for code that swallows even a BaseException."""


GRACE = 5.0
"""Seconds that a call may take to notice its deadline, before it counts as stuck."""


class DeadlineError(BaseException):
    """The time is over. No Exception, so that retries inside the call do not swallow it."""


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raises `DeadlineError` inside when `seconds` are over; None or 0 for no limit.

    It interrupts Python code and what Python waits for (sockets, sleeps, locks), not a kernel that runs on. Only the
    main thread of a Unix process can keep it; elsewhere there is no limit. An alarm that is set already, by an outer
    deadline or by the caller's own code, goes first: then this one is not set.
    """
    main = threading.current_thread() is threading.main_thread()
    if not seconds or not main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise DeadlineError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, RINGS_AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)


@contextmanager
def watched(seconds: float | None, on_stuck: Callable[[], None] | None) -> Iterator[None]:
    """Calls `on_stuck` from another thread if the block goes on `GRACE` seconds after its deadline of `seconds`.

    That is for what the alarm of `deadline` cannot interrupt: a call of C code that does not come back, or code that
    blocks the alarm.
    """
    if not seconds or on_stuck is None:
        yield
        return
    left, patience = threading.Event(), seconds + GRACE

    def watch() -> None:
        if not left.wait(patience):
            on_stuck()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        watcher.join()

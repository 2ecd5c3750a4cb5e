"""Signals that ask a run to stop, noted instead of obeyed on the spot."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR2") if hasattr(signal, name))
"""Signals that stop a run politely."""


class StopRequest:
    """Notes the first stopping signal while it watches; later ones change nothing.

    Only the main thread can watch. Child processes inherit the handler and ignore what it gets: a data loader's worker
    has to outlive the save.
    """

    def __init__(self) -> None:
        self.signal: int = 0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() == self._process and not self.signal:
            self.signal = number

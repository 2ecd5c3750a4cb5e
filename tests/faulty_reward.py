"""A reward that fails on one rank, for the tests of faults and the runs that they launch."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

FAULTY_CALL = 3


class Faulty:
    """The brightness of an image; at the third call of one rank something else.

    Args:
        fault: "killed", "raises", "sleeps", "stuck" (no alarm reaches it), "stopped" (the machine stands still) or
            "threads" (it waits for a thread that does not end).
        rank: The rank on which it fails.
    """

    __name__ = "server"

    def __init__(self, fault: str, rank: int) -> None:
        self.fault, self.rank, self.calls = fault, rank, 0

    def __call__(self, *, completions: Tensor, **columns: Any) -> Tensor:
        # Whole photos are measured before training.
        self.calls += len(completions) > 1
        if self.calls == FAULTY_CALL and int(os.environ.get("RANK", "0")) == self.rank:
            self.fail()
        return 10 * completions.mean(dim=(1, 2, 3))

    def fail(self) -> None:
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "raises":
            raise ConnectionError("the server is gone")
        if self.fault == "stuck":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        if self.fault == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fault == "threads":
            with ThreadPoolExecutor(1) as pool:
                pool.submit(time.sleep, 3600).result()
        time.sleep(3600)

"""The event loop in which async rewards run: one for all calls of a process.

Clients of HTTP and the like are bound to the loop in which they were opened; a loop of its own for every call would
close their connections under them.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import torch

from refreward_trl.rewards.deadline import DeadlineError

LAST_WORDS = 1.0
"""Seconds that tasks get to clean up when their loop is given up."""

_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""By process: a forked child must not even close its parent's loop, with which it shares the selector."""


def run_to_end(work: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine to its end and cancels what it leaves behind.

    In this thread where no loop runs in it yet, so that signals reach it; in a notebook one does.
    """
    loop = _loops.pop(os.getpid(), None) or asyncio.new_event_loop()
    run = lambda: loop.run_until_complete(_and_nothing_else(work))  # noqa: E731
    try:
        if _inside_a_loop():
            _in_a_thread(run)
        else:
            run()
    except BaseException:  # broken off, by a deadline or by Ctrl-C
        _give_up(loop)
        raise
    if _loops.setdefault(os.getpid(), loop) is not loop:
        loop.close()


async def _and_nothing_else(work: Coroutine[Any, Any, None]) -> None:
    await work
    # What is left would stand still with its loop until the next call.
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _inside_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _in_a_thread(run: Callable[[], None]) -> None:
    context, gradient = contextvars.copy_context(), torch.is_grad_enabled()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            # Whether gradients are kept is a matter of the thread.
            with torch.set_grad_enabled(gradient):
                context.run(run)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    for error in errors:
        raise error


def _give_up(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    if loop.is_running():  # in its thread, which ends with them
        for task in tasks:
            loop.call_soon_threadsafe(task.cancel)
        return
    for task in tasks:
        task.cancel()
    try:
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=LAST_WORDS))
    except DeadlineError:  # the alarm rings again
        pass
    finally:
        loop.close()


@atexit.register
def _close() -> None:
    loop = _loops.pop(os.getpid(), None)
    if loop is not None:
        loop.close()

"""Rewards called: each by name and with a deadline, one after the other, or together where they are coroutines."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from refreward_trl.errors import RefRewardError, RewardError
from refreward_trl.rewards.deadline import RINGS_AGAIN, DeadlineError, deadline, watched
from refreward_trl.rewards.event_loop import run_to_end
from refreward_trl.types import RewardFunction

AT_ONCE = 8
"""Async rewards that run at the same time; the others wait for their turn, before their time begins to count."""

OnStuck: TypeAlias = Callable[[str], None]
"""Called from another thread with the name of a reward that even its deadline could not end."""


def is_async(func: Callable[..., Any]) -> bool:
    """Whether a reward is a coroutine function, or an object whose `__call__` is one; under any `partial`."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


def call_reward(
    func: RewardFunction,
    name: str,
    arguments: Mapping[str, Any],
    timeout: float | None = None,
    on_stuck: OnStuck | None = None,
) -> Any:
    """Calls one reward with `arguments` as keywords, and awaits it if it is async.

    Raises:
        RewardError: Naming the reward, chained to whatever it raised, or after `timeout` seconds. The package's own
            errors pass unchanged: they already say what, where and how to fix it.
    """
    if is_async(func):
        return call_together({name: func}, arguments, timeout, on_stuck=on_stuck)[name]
    stuck = functools.partial(on_stuck, name) if on_stuck else None
    with _named(name, timeout), watched(timeout, stuck), deadline(timeout):
        return func(**arguments)


def call_together(
    funcs: Mapping[str, RewardFunction],
    arguments: Mapping[str, Any],
    timeout: float | None = None,
    *,
    stop_early: bool = True,
    on_stuck: OnStuck | None = None,
) -> dict[str, Any]:
    """Awaits async rewards together, at most `AT_ONCE` at a time, each for at most `timeout` seconds.

    Nothing that they started survives: tasks that are left over are cancelled.

    Args:
        funcs: The rewards by name.
        arguments: Their keywords.
        timeout: Seconds that each may take, from the moment it begins.
        stop_early: Whether the first error is raised, and what still runs cancelled.
        on_stuck: See `call_reward`.

    Returns:
        By name what each returned, or without `stop_early` the `RewardError` that says why it did not.

    Raises:
        RewardError: See `stop_early`.
        RefRewardError: The package's own errors, always.
    """
    if not funcs:
        return {}
    outcomes: dict[str, Any] = {}
    calls = _await_all(funcs, arguments, timeout, stop_early, outcomes)
    # One deadline for all of them, against coroutines that never wait or refuse to be cancelled.
    limit = timeout and timeout * math.ceil(len(funcs) / AT_ONCE) + RINGS_AGAIN
    stuck = functools.partial(on_stuck, " or ".join(funcs)) if on_stuck else None
    with watched(limit, stuck):
        try:
            with deadline(limit):
                run_to_end(calls)
        except DeadlineError:
            if timeout is None:  # it is a caller's
                raise
    for error in outcomes.values():
        if isinstance(error, RefRewardError) and (stop_early or not isinstance(error, RewardError)):
            raise error
    for name in funcs:
        if name not in outcomes:
            outcomes[name] = _too_late(name, timeout)
            if stop_early:
                raise outcomes[name]
    return outcomes


async def _await_all(
    funcs: Mapping[str, RewardFunction],
    arguments: Mapping[str, Any],
    timeout: float | None,
    stop_early: bool,
    outcomes: dict[str, Any],
) -> None:
    """Puts what each reward returned, or its error, into `outcomes` as soon as it is there."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def collect(name: str) -> None:
        async with slots:
            try:
                outcomes[name] = await _await_one(funcs[name], name, arguments, timeout)
            except RefRewardError as error:
                outcomes[name] = error
                raise

    tasks = [asyncio.create_task(collect(name)) for name in funcs]
    _, waiting = await asyncio.wait(
        tasks, return_when=asyncio.FIRST_EXCEPTION if stop_early else asyncio.ALL_COMPLETED
    )
    for task in waiting:
        task.cancel()
    # Retrieved here, so that asyncio does not report them as lost.
    await asyncio.gather(*tasks, return_exceptions=True)


async def _await_one(func: RewardFunction, name: str, arguments: Mapping[str, Any], timeout: float | None) -> Any:
    task = asyncio.current_task()
    assert task is not None
    with _named(name, timeout):
        try:
            async with asyncio.timeout(timeout) as scope:
                returned: Any = func(**arguments)
                returned = await returned
        except TimeoutError:
            if scope.expired():
                raise DeadlineError from None
            raise
        except asyncio.CancelledError:
            if task.cancelling():
                raise
            raise RuntimeError("it was cancelled from inside") from None
        if scope.expired():  # it swallowed its cancellation
            raise DeadlineError
        return returned


@contextmanager
def _named(name: str, timeout: float | None) -> Iterator[None]:
    """Inside, whatever is raised becomes a `RewardError` that names the reward."""
    try:
        yield
    except RefRewardError:
        raise
    except DeadlineError as error:
        raise _too_late(name, timeout) from error
    except Exception as error:
        raise RewardError(
            f"raised {type(error).__name__}: {error}",
            where=f"reward {name!r}",
            fix="see the exception above this one; return None for a completion that cannot be scored",
        ) from error


def _too_late(name: str, timeout: float | None) -> RewardError:
    return RewardError(
        "did not return in time" if timeout is None else f"did not return within {timeout:g} seconds",
        where=f"reward {name!r}",
        fix="see what it waits for, or raise reward_timeout",
    )

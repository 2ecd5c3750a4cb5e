"""Async rewards: awaited together, each with its deadline, and nothing of them stays behind."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from refreward_trl.errors import DataError, RewardError
from refreward_trl.rewards import load_reward, score_all, to_trl
from refreward_trl.rewards.calling import AT_ONCE, call_reward, is_async
from refreward_trl.rewards.event_loop import _loops

COUNT = 4
Reward = Callable[..., Any]


def named(name: str, reward: Reward) -> Reward:
    reward.__name__ = name
    return reward


def score(*rewards: Reward, **keywords: Any) -> Any:
    images = keywords.pop("completions", torch.zeros(COUNT, 3, 8, 8))
    return score_all(rewards, None, None, completions=images, lr_image=torch.zeros(COUNT, 3, 2, 2), **keywords)


async def function(*, completions: Any, **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(index) for index in range(len(completions))]


class Judge:
    """A class whose call is a coroutine."""

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    async def __call__(self, *, completions: Any, **columns: Any) -> list[float]:
        await asyncio.sleep(0)
        return [self.offset + index for index in range(len(completions))]


def plain(*, completions: Any, **columns: Any) -> list[float]:
    return [10.0] * len(completions)


async def forever(**columns: Any) -> list[float]:
    await asyncio.sleep(3600)
    return [0.0] * COUNT


async def broken(**columns: Any) -> list[float]:
    raise ConnectionError("the server is gone")


async def cancelled(**columns: Any) -> list[float]:
    raise asyncio.CancelledError


async def refuses_to_end(**columns: Any) -> list[float]:
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue


async def late_but_there(**columns: Any) -> list[float]:
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        return [1.0] * COUNT
    return [0.0] * COUNT


async def never_waits(**columns: Any) -> list[float]:
    time.sleep(3600)
    return [0.0] * COUNT


@pytest.fixture(autouse=True)
def nothing_left() -> Any:
    """Threads and tasks are as many after every test as before."""
    threads = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == threads
    assert not [task for loop in _loops.values() for task in asyncio.all_tasks(loop)]


@pytest.mark.parametrize(
    "reward",
    [function, Judge(), functools.partial(function, extra=1), functools.partial(Judge())],
    ids=["function", "object", "partial function", "partial object"],
)
def test_every_form_is_seen_and_awaited(reward: Reward) -> None:
    assert is_async(reward)
    assert score(reward).total.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_what_is_async_is_so_for_trl() -> None:
    from trl.trainer.utils import is_async_callable

    rewards = [function, Judge(), Judge, plain, functools.partial(function), functools.partial(Judge()), print]
    assert [is_async(reward) for reward in rewards] == [is_async_callable(reward) for reward in rewards]


def test_the_order_of_weights_stays_that_of_the_rewards() -> None:
    table = score(function, plain, Judge(100.0))
    assert list(table.per_reward) == ["function", "plain", "Judge"]
    assert table.total.tolist() == [110.0, 112.0, 114.0, 116.0]
    weighted = score_all(
        [function, plain], None, [1.0, 2.0], completions=torch.zeros(2, 3, 8, 8), lr_image=torch.zeros(2, 3, 2, 2)
    )
    assert weighted.total.tolist() == [20.0, 21.0]


def test_they_run_at_the_same_time_under_a_cap() -> None:
    running, most = 0, 0

    async def reward(**columns: Any) -> list[float]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return [1.0] * COUNT

    rewards = [named(f"r{number}", functools.partial(reward)) for number in range(2 * AT_ONCE + 1)]
    assert score(*rewards).total.tolist() == [2.0 * AT_ONCE + 1] * COUNT
    assert most == AT_ONCE


def test_a_graph_comes_through() -> None:
    async def brightness(*, completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        await asyncio.sleep(0)
        return completions.mean(dim=(1, 2, 3))

    images = torch.rand(COUNT, 3, 8, 8, requires_grad=True)
    score(brightness, completions=images).total.sum().backward()
    assert images.grad is not None and bool((images.grad > 0).all())
    with torch.no_grad():
        assert not score(brightness, completions=images).total.requires_grad


BAD = {
    "raises": (broken, r"raised ConnectionError: the server is gone"),
    "cancelled": (cancelled, r"raised RuntimeError: it was cancelled from inside"),
    "too late": (forever, r"did not return within 0\.2 seconds"),
    "refuses to end": (refuses_to_end, r"did not return within 0\.2 seconds"),
    "late but there": (late_but_there, r"did not return within 0\.2 seconds"),
    "never waits": (never_waits, r"did not return within 0\.2 seconds"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_fails_stops_or_is_dropped_by_name(case: str) -> None:
    reward, message = BAD[case]
    with pytest.raises(RewardError, match=rf"reward '{reward.__name__}': {message}"):
        score(plain, reward, timeout=0.2)
    table = score(plain, reward, on_bad="drop", timeout=0.2)
    assert table.failed == {"plain": 0, reward.__name__: COUNT}
    assert table.total.isnan().all()
    # The next call finds a loop that works.
    assert score(function).total.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_dropping_one_leaves_what_the_others_return() -> None:
    table = score(function, broken, forever, on_bad="drop", timeout=1.0)
    assert table.failed == {"function": 0, "broken": COUNT, "forever": COUNT}
    assert table.per_reward["function"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_stopping_does_not_wait_for_the_others() -> None:
    started = time.monotonic()
    with pytest.raises(RewardError, match="reward 'broken'"):
        score(forever, broken, timeout=600.0)
    assert time.monotonic() - started < 60
    with pytest.raises(RewardError, match="reward 'broken'"):  # nor without a limit
        score(forever, broken)


def test_the_time_of_one_that_waits_for_its_turn_does_not_count() -> None:
    async def slow(**columns: Any) -> list[float]:
        await asyncio.sleep(0.6)
        return [1.0] * COUNT

    rewards = [named(f"r{number}", functools.partial(slow)) for number in range(AT_ONCE + 1)]
    assert score(*rewards, timeout=1.0).total.tolist() == [AT_ONCE + 1.0] * COUNT


def test_our_own_errors_pass_even_when_dropping() -> None:
    async def unreadable(**columns: Any) -> list[float]:
        raise DataError("no lr_image")

    with pytest.raises(DataError, match="no lr_image"):
        score(unreadable, on_bad="drop")


def test_what_they_start_and_leave_is_cancelled() -> None:
    ended = []

    async def linger() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(True)

    async def leaving(**columns: Any) -> list[float]:
        columns["log_extra"]("task", [asyncio.create_task(linger())])
        await asyncio.sleep(0)
        return [1.0] * COUNT

    kept: list[Any] = []
    score(leaving, log_extra=lambda name, values: kept.extend(values))
    assert ended == [True]
    assert kept[0].cancelled()


def test_a_client_that_is_kept_open_works_at_the_next_call() -> None:
    class Client:
        """What HTTP clients are: bound to the loop of their first call."""

        def __init__(self) -> None:
            self.queue: asyncio.Queue[float] | None = None

        async def __call__(self, **columns: Any) -> list[float]:
            if self.queue is None:
                self.queue, self.loop = asyncio.Queue(), asyncio.get_running_loop()
            assert asyncio.get_running_loop() is self.loop
            self.loop.call_later(0.001, self.queue.put_nowait, 1.0)
            return [await self.queue.get()] * COUNT

    client = Client()
    for _ in range(3):
        assert score(client).total.tolist() == [1.0] * COUNT


def test_inside_a_running_loop_as_in_a_notebook() -> None:
    async def brightness(*, completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        await asyncio.sleep(0)
        return completions.mean(dim=(1, 2, 3))

    async def cell() -> tuple[bool, bool]:
        images = torch.rand(COUNT, 3, 8, 8, requires_grad=True)
        with torch.no_grad():
            without = score(brightness, completions=images).total
        return score(brightness, completions=images).total.requires_grad, without.requires_grad

    assert asyncio.run(cell()) == (True, False)


def test_a_reward_that_is_late_inside_a_running_loop() -> None:
    async def cell() -> None:
        with pytest.raises(RewardError, match="reward 'forever': did not return within"):
            score(forever, timeout=0.2)

    asyncio.run(cell())


def test_wherever_rewards_are_taken() -> None:
    assert load_reward(f"{__name__}.function") is function
    assert call_reward(function, "function", {"completions": [0, 0]}) == [0.0, 1.0]
    images = [torch.zeros(3, 8, 8)] * 2
    in_trl = to_trl(function, lambda completion, columns: images[int(completion)])
    assert in_trl(prompts=["", ""], completions=["0", "1"], lr_image=images) == [0.0, 1.0]


def test_what_only_looks_async_says_how_to_be_it() -> None:
    def returns_a_coroutine(**columns: Any) -> Any:
        return function(**columns)

    with pytest.raises(RewardError, match="define the reward itself as `async def`"):
        score(returns_a_coroutine)
    gc.collect()

"""Calls end in time, and the alarm is put back as it was found."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress

import pytest

from refreward_trl.errors import RewardError
from refreward_trl.rewards.calling import call_reward
from refreward_trl.rewards.deadline import DeadlineError, deadline


def test_a_call_that_waits_is_ended_by_name() -> None:
    def slow_server(**columns: object) -> list[float]:
        time.sleep(60)
        return []

    started = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'slow_server': did not return within 0\.2 seconds"):
        call_reward(slow_server, "slow_server", {}, timeout=0.2)
    assert time.monotonic() - started < 30
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_retries_do_not_swallow_it() -> None:
    def retrying(**columns: object) -> None:
        for _ in range(5):
            try:
                time.sleep(60)
            except Exception:
                continue

    with pytest.raises(RewardError, match="did not return"):
        call_reward(retrying, "retrying", {}, timeout=0.1)


def test_it_rings_again_for_code_that_swallows_everything() -> None:
    rang = 0
    with pytest.raises(DeadlineError), deadline(0.05):
        while rang < 1:
            try:
                time.sleep(60)
            except BaseException:
                rang += 1
        time.sleep(60)


def test_a_call_in_time_leaves_no_trace() -> None:
    before, threads = signal.getsignal(signal.SIGALRM), threading.active_count()
    assert call_reward(lambda **_: [1.0], "fast", {}, timeout=50.0) == [1.0]
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert threading.active_count() == threads


def test_an_alarm_of_the_caller_goes_first() -> None:
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with deadline(0.01):
            time.sleep(0.05)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize("seconds", [None, 0])
def test_no_limit(seconds: float | None) -> None:
    with deadline(seconds):
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_other_threads_have_no_limit() -> None:
    found: list[bool] = []

    def inside() -> None:
        with deadline(0.01):
            time.sleep(0.05)
            found.append(True)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize("blocked", [False, True])
def test_a_call_that_no_alarm_ends_is_reported_from_another_thread(
    monkeypatch: pytest.MonkeyPatch, blocked: bool
) -> None:
    monkeypatch.setattr("refreward_trl.rewards.deadline.GRACE", 0.1)
    stuck, threads = threading.Event(), threading.active_count()
    names: list[str] = []

    def on_stuck(name: str) -> None:
        names.append(name)
        stuck.set()

    def server(**columns: object) -> list[float]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM} if blocked else set())
        stuck.wait(60 if blocked else 0)
        return [1.0]

    try:
        with suppress(RewardError):  # it is still too late, once it does come back
            call_reward(server, "server", {}, timeout=0.1 if blocked else 50.0, on_stuck=on_stuck)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    assert names == (["server"] if blocked else [])
    assert threading.active_count() == threads

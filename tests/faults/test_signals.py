"""Stopping signals at any moment, to one rank or to both: saved, 75, and the run goes on to the same bits."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refreward_trl import checkpointing
from refreward_trl.errors import Preempted
from refreward_trl.trainers.preemption import STOPPED_FILE

pytestmark = pytest.mark.faults

SIGNALS = {
    "SIGTERM": [signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
    "SIGUSR2": [signal.SIGUSR2],
    "SIGTERM twice": [signal.SIGTERM, signal.SIGTERM],
}
SPOTS = ("update", "reward", "save")
STEP = 5
"""The step that the signal stops: it comes in the middle of this step, or in the save of the step before."""


def send_once(owner: Any, name: str, number: signal.Signals, due: Callable[[], bool]) -> None:
    """Makes a method send its process a signal before it does its work, the first time that it is due."""
    function, sent = getattr(owner, name), []

    def call(*arguments: Any, **keywords: Any) -> Any:
        if not sent and due():
            sent.append(number)
            os.kill(os.getpid(), number)
        return function(*arguments, **keywords)

    setattr(owner, name, call)


def arm(trainer: Any, numbers: list[signal.Signals], spot: str) -> None:
    """Lets a trainer get the first signal at a spot, and a second one while the run is being saved."""
    in_step = lambda: trainer.state.global_step == STEP - 1  # noqa: E731
    owner, name = {
        "update": (trainer, "_get_grad_norm"),
        "reward": (trainer, "score"),
        "save": (trainer, "_write_parts"),
    }[spot]
    send_once(owner, name, numbers[0], in_step)
    for number in numbers[1:]:
        send_once(trainer, "_write_extra_state", number, lambda: bool(trainer._request.signal))


def train(
    harness: SimpleNamespace, kind: str, folder: Path, numbers: list[signal.Signals], spot: str, ranks: set[int]
) -> dict[str, Any]:
    """Runs in a child: a run that is stopped, and then goes on. Returns how it ended, and how it was stopped."""
    changes = {"num_iterations": 1} if kind.startswith("ddpo") else {}
    stopped: dict[str, Any] = {}
    if numbers:
        trainer = harness.make_trainer(kind, folder, **changes)
        if int(os.environ.get("RANK", "0")) in ranks:
            arm(trainer, numbers, spot)
        try:
            trainer.train()
        except Preempted as error:
            stopped = {"code": error.exit_code, "step": trainer.state.global_step, "message": str(error)}
            checkpointing.verify(checkpointing.checkpoint_folder(folder, stopped["step"]))
            if trainer.args.should_save:  # and deletes it again, maybe before another rank could look
                assert (folder / STOPPED_FILE).exists()
        handlers = [signal.getsignal(number) for number in SIGNALS["SIGTERM twice"]]
        assert handlers == [signal.SIG_DFL] * 2
    trainer = harness.make_trainer(kind, folder, **changes)
    trainer.train()
    assert not (folder / STOPPED_FILE).exists()
    return {**harness.ending(trainer), "stopped": stopped}


def check(end: Any, reference: Any, name: str, log: Path) -> None:
    """Whether a child was stopped as it should be, and went on to the end of the run that never was."""
    assert end is not None, log.read_text()[-3000:]
    stopped = end.pop("stopped")
    assert (stopped["code"], stopped["step"]) == (75, STEP)
    assert f"{name.partition(' ')[0]} stopped the run after step {STEP}; checkpoint-{STEP}" in stopped["message"]
    assert end == reference


@pytest.mark.parametrize("spot", SPOTS)
@pytest.mark.parametrize("kind", ["refl-lora", "ddpo-full"])
def test_one_process(
    harness: SimpleNamespace, tally: Callable[[str], Any], tmp_path: Path, kind: str, spot: str
) -> None:
    action = functools.partial(train, harness, kind)
    _, reference = harness.in_child(functools.partial(action, tmp_path / "whole", [], spot, {0}), tmp_path / "0.log")
    reference.pop("stopped")
    for name, numbers in SIGNALS.items():
        with tally("signal-alone").trial():
            log = tmp_path / f"{name}.log"
            _, end = harness.in_child(functools.partial(action, tmp_path / name, numbers, spot, {0}), log)
            check(end, reference, name, log)


@pytest.mark.parametrize("spot", SPOTS)
def test_two_ranks(harness: SimpleNamespace, tally: Callable[[str], Any], tmp_path: Path, spot: str) -> None:
    action = functools.partial(train, harness, "refl-lora")
    whole = harness.in_ranks(functools.partial(action, tmp_path / "whole", [], spot, set()), tmp_path / "whole.log")
    references = [end for _, end in whole]
    for reference in references:
        reference.pop("stopped")
    for name, numbers in SIGNALS.items():
        for ranks in ({1}, {0, 1}):
            with tally("signal").trial():
                folder = tmp_path / f"{name} {ranks}"
                log = folder.with_suffix(".log")
                ends = harness.in_ranks(functools.partial(action, folder, numbers, spot, ranks), log)
                for rank, (_, end) in enumerate(ends):
                    check(end, references[rank], name, harness.rank_log(log, rank))

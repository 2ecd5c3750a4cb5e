"""SIGKILL at any moment: what is visible is complete, and the run that goes on ends in the same bits."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launching import PATIENCE, ended, furnish, kill_all, needs_deepspeed, started, wait_until
from transformers import TrainerCallback

from refreward_trl import checkpointing

pytestmark = pytest.mark.faults

TRIALS = {"rm-conv": 30, "refl-lora": 12, "refl-full": 12, "ddpo-lora": 12, "ddpo-full": 12}
"""Kills at random moments, for each kind: with those in a save, at least 60 for each of the three trainers."""
SAVE = 4
"""The step whose save is killed: there is a checkpoint before it, and it deletes none."""
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate"}


class FileOperations:
    """Counts what is done to the files of a folder while it is on, and kills this process before one of them."""

    def __init__(self, folder: Path, fatal: int | None = None) -> None:
        self.folder, self.fatal = str(folder), fatal
        self.on, self.count = False, 0
        sys.addaudithook(self._hook)
        self._fsync, os.fsync = os.fsync, self._counted_fsync

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in EVENTS and str(arguments[0]).startswith(self.folder):
            self._tick()

    def _counted_fsync(self, descriptor: int) -> None:
        if self.on:
            self._tick()
        self._fsync(descriptor)

    def _tick(self) -> None:
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


class KillIn(TrainerCallback):
    """Kills the process at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    harness: SimpleNamespace, kind: str, folder: Path, *, fatal: int | None = None, kill_in: int | None = None
) -> dict[str, Any]:
    """Runs in the child. Returns how it ended, and the number of file operations of the watched save."""
    trainer = harness.make_trainer(kind, folder)
    operations = FileOperations(folder, fatal)
    save = trainer._save_checkpoint

    def watched(model: Any, trial: Any) -> None:
        operations.on = trainer.state.global_step == SAVE
        save(model, trial)
        operations.on = False

    trainer._save_checkpoint = watched
    if kill_in is not None:
        trainer.add_callback(KillIn(kill_in))
    trainer.train()
    return {**harness.ending(trainer), "operations": operations.count}


class Trials:
    """Kills runs of one kind and lets them go on."""

    def __init__(self, harness: SimpleNamespace, kind: str, folder: Path) -> None:
        self.harness, self.kind, self.folder = harness, kind, folder
        begun = time.monotonic()
        code, self.reference = self.run("reference")
        self.seconds = time.monotonic() - begun
        assert code == 0, (folder / "reference.log").read_text()[-3000:]
        self.operations = self.reference.pop("operations")

    def run(self, name: str, kill_after: float | None = None, **how: Any) -> tuple[int, Any]:
        action = functools.partial(train, self.harness, self.kind, self.folder / name, **how)
        return self.harness.in_child(action, self.folder / f"{name}.log", kill_after)

    def kill_and_go_on(self, name: str, **how: Any) -> bool:
        """Returns whether the run was killed before its end."""
        code, _ = self.run(name, **how)
        assert code in (0, -signal.SIGKILL), (self.folder / f"{name}.log").read_text()[-3000:]
        for checkpoint in checkpointing.list_checkpoints(self.folder / name):
            checkpointing.verify(checkpoint)
        again, end = self.run(name)
        assert again == 0, (self.folder / f"{name}.log").read_text()[-3000:]
        end.pop("operations")
        assert end == self.reference, f"{self.kind}, {name}: {how}"
        return code != 0


@pytest.fixture
def trials(harness: SimpleNamespace, tmp_path: Path) -> Callable[[str], Trials]:
    return lambda kind: Trials(harness, kind, tmp_path)


@pytest.mark.parametrize("kind", ["rm-conv", "refl-lora", "ddpo-full"])
def test_killed_before_every_file_operation_of_a_save(
    trials: Callable[[str], Trials], tally: Callable[[str], Any], kind: str
) -> None:
    run = trials(kind)
    assert run.operations > 20
    for k in range(run.operations):
        with tally("kill-in-save").trial():
            assert run.kill_and_go_on(f"operation-{k}", fatal=k)


@pytest.mark.parametrize("kind", TRIALS)
def test_killed_at_any_moment(trials: Callable[[str], Trials], tally: Callable[[str], Any], kind: str) -> None:
    run = trials(kind)
    moments = random.Random(kind)
    for number in range(TRIALS[kind]):
        with tally("kill-anywhere").trial():
            run.kill_and_go_on(f"moment-{number}", kill_after=moments.uniform(0.1, 1.0) * run.seconds)


@pytest.mark.parametrize("kind", ["ddpo-lora", "ddpo-full"])
def test_killed_inside_a_rollout(trials: Callable[[str], Trials], tally: Callable[[str], Any], kind: str) -> None:
    """Steps 1, 2, 4 and 5 lie inside the two rollouts of three updates; checkpoints 2 and 4 too."""
    run = trials(kind)
    for step in (1, 2, 4, 5):
        with tally("kill-in-rollout").trial():
            assert run.kill_and_go_on(f"step-{step}", kill_in=step)


LAUNCHED_KILLS = 10
LAUNCHED_STEPS = 100
"""More than the parts of the run can take together before they are killed."""


def losses(run: Path) -> list[tuple[int, float]]:
    """Returns steps and losses as `metrics.jsonl` has them; a line that is just being written is left out."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def last_step(run: Path) -> int:
    return max((step for step, _ in losses(run)), default=0)


def check_part(run: Path, reference: list[tuple[int, float]]) -> int:
    """Checks what is visible of a run and that it has walked the reference's way; returns how far that is."""
    for checkpoint in checkpointing.list_checkpoints(run):
        checkpointing.verify(checkpoint)
    walked = losses(run)
    assert [step for step, _ in walked] == list(range(1, len(walked) + 1))
    assert [loss for _, loss in walked] == pytest.approx([loss for _, loss in reference[: len(walked)]], abs=1e-6)
    return len(walked)


def launched(place: Path, log: Path) -> Any:
    counts = ("--max_steps", str(LAUNCHED_STEPS), "--save_steps", "2", "--save_total_limit", "2")
    return started(place, "zero2.yaml", *counts, "--logging_steps", "1", log=log)


@pytest.mark.slow
@needs_deepspeed
def test_a_launch_is_killed_again_and_again(tally: Callable[[str], Any], tmp_path: Path) -> None:
    """One run in many parts, so that each kill costs one start. Each part dies some steps behind its checkpoint."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        furnish(tmp_path / name)
    whole = launched(tmp_path / "whole", tmp_path / "whole.log")
    assert ended(whole, 2 * PATIENCE).returncode == 0, (tmp_path / "whole.log").read_text()[-4000:]
    reference = losses(tmp_path / "whole/run")
    assert [step for step, _ in reference] == list(range(1, LAUNCHED_STEPS + 1))
    moments, run = random.Random(0), tmp_path / "killed/run"
    for number in range(LAUNCHED_KILLS):
        log = tmp_path / f"part-{number}.log"
        with tally("kill-launched").trial():
            process = launched(tmp_path / "killed", log)
            # There are lines behind the newest checkpoint, which the run takes back when it goes on.
            target = max(last_step(run) + moments.randint(1, 4), 3)
            wait_until(lambda target=target: last_step(run) >= target, process, log)
            time.sleep(moments.uniform(0, 0.2))
            assert kill_all(process) >= 3, "the launcher and two ranks"
            check_part(run, reference)
    last = launched(tmp_path / "killed", tmp_path / "last.log")
    assert ended(last, 2 * PATIENCE).returncode == 0, (tmp_path / "last.log").read_text()[-4000:]
    assert check_part(run, reference) == LAUNCHED_STEPS

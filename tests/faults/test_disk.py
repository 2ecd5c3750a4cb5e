"""Disks that fill up, become read-only or forbid large files, and folders with two runs: earlier checkpoints survive,
and the same command goes on to the same bits once there is room."""

from __future__ import annotations

import functools
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback

from refreward_trl import checkpointing
from refreward_trl.trainers import run_folder
from refreward_trl.trainers.run_folder import LOCK_FILE

pytestmark = pytest.mark.faults

KINDS = ("refl-lora", "rm-conv")
LEVELS = 12
FULL_FROM = 2
"""The step after whose save the fault begins: the saves of the next three steps fail."""
PAGE = 4096
"""A file system hands out whole pages."""
FILLER = "somebody-elses-file"


class After(TrainerCallback):
    """Does something once, after a step and its save."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The end of the next step's computation: the save of `step` is over.
        if state.global_step == self.step + 1:
            self.action()


def fill(disk: Path, free: int) -> None:
    """Fills a disk until so many bytes are left."""
    with (disk / FILLER).open("wb") as file:
        while (left := shutil.disk_usage(disk).free - free) >= PAGE:
            file.write(b"x" * (left // PAGE * PAGE))
            file.flush()


def forbid_files_above(size: int) -> None:
    # The log of the child is such a file too.
    os.ftruncate(1, 0)
    os.lseek(1, 0, os.SEEK_SET)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def mount(*words: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def train(harness: SimpleNamespace, kind: str, folder: Path, fault: Callable[[], Any] | None) -> Any:
    """Runs in the child."""
    logging.basicConfig(stream=sys.stderr, force=True)  # where the harness looks, and not where pytest does
    trainer = harness.make_trainer(kind, folder, save_steps=1)
    if fault is not None:
        trainer.add_callback(After(FULL_FROM, fault))
    trainer.train()
    return harness.ending(trainer)


class Runs:
    """Runs of one kind: without a fault, with one, and once it is over."""

    def __init__(self, harness: SimpleNamespace, kind: str, folder: Path) -> None:
        self.harness, self.kind, self.folder = harness, kind, folder
        code, self.reference = self.run(folder / "reference")
        assert code == 0, self.log
        self.checkpoint = folder / "reference" / "checkpoint-5"

    def run(self, output: Path, fault: Callable[[], Any] | None = None) -> tuple[int, Any]:
        log = self.folder / "run.log"
        ended = self.harness.in_child(functools.partial(train, self.harness, self.kind, output, fault), log)
        self.log = log.read_text()
        return ended

    def fail(self, output: Path, fault: Callable[[], Any], code: int = 5) -> None:
        """A run with the fault ends with the code; what it saved before is intact and nothing lies about."""
        ended, _ = self.run(output, fault)
        assert ended == code, self.log[-3000:]
        assert checkpoints(output) == [f"checkpoint-{step}" for step in range(1, FULL_FROM + 1)]
        for folder in checkpointing.list_checkpoints(output):
            checkpointing.verify(folder)
        assert not list(output.glob(".tmp*"))

    def go_on(self, output: Path) -> None:
        """The same command ends in the bits of a run without a fault."""
        code, end = self.run(output)
        assert code == 0, self.log[-3000:]
        assert f"resuming from {output / f'checkpoint-{FULL_FROM}'}" in self.log
        assert end == self.reference


def checkpoints(output: Path) -> list[str]:
    return [folder.name for folder in checkpointing.list_checkpoints(output)]


def pages(checkpoint: Path) -> int:
    """Returns the bytes that the files of a checkpoint take from a disk."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in checkpoint.rglob("*") if path.is_file())


def last_line(log: str) -> str:
    return next(line for line in reversed(log.splitlines()) if "Error: " in line)


@pytest.fixture
def runs(harness: SimpleNamespace, tmp_path: Path) -> Callable[[str], Runs]:
    return lambda kind: Runs(harness, kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full(runs: Callable[[str], Runs], disk: Path, tally: Callable[[str], Any], kind: str) -> None:
    """With room for one twelfth of a checkpoint, two, and so on, up to one page less than it needs."""
    run = runs(kind)
    needed = pages(run.checkpoint)
    told = run_folder.readable(checkpointing.size(run.checkpoint))
    for level in range(1, LEVELS + 1):
        output, free = disk / f"level-{level}", needed * level // LEVELS - PAGE
        with tally("full-disk").trial():
            # The metrics need a page now and then.
            run.fail(output, functools.partial(fill, disk, max(free, 2 * PAGE)))
            assert run.log.count("training goes on, and saves again after the next save_steps") == 2
            assert "checkpoint-5 could not be written: " in last_line(run.log)
            assert "disk" in last_line(run.log) and f"free, a checkpoint takes {told[:2]}" in last_line(run.log)
            (disk / FILLER).unlink()
            run.go_on(output)
        shutil.rmtree(output)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_without_a_single_byte(
    runs: Callable[[str], Runs], disk: Path, tally: Callable[[str], Any], kind: str
) -> None:
    """A metric that cannot be written would be a gap, so the run ends before its next save."""
    run = runs(kind)
    with tally("full-disk").trial():
        big = functools.partial(fill, disk, 0)
        # A line of metrics fits into the page that the file has already, unless that is full.
        pad = functools.partial(_fill_last_page, disk / "run" / "metrics.jsonl")
        run.fail(disk / "run", lambda: (pad(), big()), code=6)
        assert "the metrics of step 3 cannot be written: the disk is full" in run.log
        (disk / FILLER).unlink()
        run.go_on(disk / "run")


def _fill_last_page(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n" * (-path.stat().st_size % PAGE))


@pytest.mark.parametrize("kind", [*KINDS, "ddpo-full"])
def test_files_that_may_not_grow(runs: Callable[[str], Runs], tally: Callable[[str], Any], kind: str) -> None:
    """Half of the weights, half of the optimizer's state; needs no rights, unlike the disks."""
    run = runs(kind)
    for name in ("model.safetensors", "optimizer.pt"):
        output = run.folder / f"limit-{name}"
        with tally("file-limit").trial():
            size = (run.checkpoint / name).stat().st_size // 2
            # The metrics stay below that.
            run.fail(output, functools.partial(forbid_files_above, max(size, 8 * PAGE)))
            run.go_on(output)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_becomes_read_only(
    runs: Callable[[str], Runs], disk: Path, tally: Callable[[str], Any], kind: str
) -> None:
    """As a file system does after an error of its disk; what is open for writing, such as the lock, goes on."""
    run = runs(kind)
    with tally("read-only").trial():
        remount = functools.partial(subprocess.run, ["mount", "-o", "remount,ro", str(disk)], check=True)
        try:
            run.fail(disk / "run", _without_open_files(disk, remount), code=6)
            assert "the metrics of step 3 cannot be written: the file system is read-only" in run.log
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        run.go_on(disk / "run")


def _without_open_files(disk: Path, remount: Callable[[], Any]) -> Callable[[], None]:
    """A disk cannot be remounted read-only while a file on it is open for writing: the lock moves elsewhere."""

    def act() -> None:
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith(str(disk)):
                    nowhere = os.open(os.devnull, os.O_RDWR)
                    os.dup2(nowhere, int(name))
                    os.close(nowhere)
        remount()

    return act


def test_a_folder_that_is_read_only_from_the_start(
    runs: Callable[[str], Runs], disk: Path, tally: Callable[[str], Any]
) -> None:
    run = runs("refl-lora")
    with tally("read-only").trial():
        mount("-o", "remount,ro", disk)
        code, _ = run.run(disk / "run")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert code == 6
        assert "the folder cannot be written to: the file system is read-only" in run.log


def test_two_runs_in_one_folder(runs: Callable[[str], Runs], tally: Callable[[str], Any], tmp_path: Path) -> None:
    """The second is refused; the lock of a run that was killed is taken over."""
    run = runs("refl-lora")
    output = tmp_path / "shared"
    with tally("two-runs").trial():
        first = os.fork()
        if first == 0:
            with suppress(BaseException):
                train(run.harness, "refl-lora", output, lambda: time.sleep(600))
            os._exit(1)
        try:
            _wait_for(output / f"checkpoint-{FULL_FROM}" / checkpointing.MANIFEST)
            run_folder.lock_run_folder.__defaults__ = (1.0,)
            code, _ = run.run(output)
            assert code == 6, run.log[-3000:]
            assert "another run is writing to this folder" in run.log
        finally:
            run_folder.lock_run_folder.__defaults__ = (run_folder.LOCK_PATIENCE,)
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)
    with tally("two-runs").trial():
        assert (output / LOCK_FILE).is_file()
        run.go_on(output)


def _wait_for(path: Path) -> None:
    patience = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < patience, f"{path} does not appear"
        time.sleep(0.02)

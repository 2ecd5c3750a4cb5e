"""One run at a time writes to a folder; full disks cost a save, not the run, and never an old checkpoint."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from refreward_trl import checkpointing
from refreward_trl.errors import CheckpointError, SetupError
from refreward_trl.trainers import run_folder
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, no file can grow beyond `size` bytes: writing fails as on a full disk, with another number."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


# The lock


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = run_folder.lock_run_folder(tmp_path / "run")
    with pytest.raises(SetupError, match="another run is writing to this folder"):
        run_folder.lock_run_folder(tmp_path / "run", patience=0)
    first.release()
    run_folder.lock_run_folder(tmp_path / "run", patience=0).release()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        held = run_folder.lock_run_folder(tmp_path)
        os.write(writing, b"x")
        signal.pause()
        held.release()
    os.read(reading, 1)
    try:
        with pytest.raises(SetupError):
            run_folder.lock_run_folder(tmp_path, patience=0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run_folder.lock_run_folder(tmp_path, patience=0).release()


# Before training


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot be written to: Not a directory"):
        run_folder.lock_run_folder(tmp_path / "file" / "run")
    with largest_file(100), pytest.raises(SetupError, match="larger than the limit for one file"):
        run_folder.lock_run_folder(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_checkpoints_that_will_not_fit_are_refused(tmp_path: Path) -> None:
    run_folder.check_space(tmp_path, 1000, 2)
    with pytest.raises(SetupError, match=r"3 checkpoints of 1e\+15 TB need 3e\+15 TB, but .* are free"):
        run_folder.check_space(tmp_path, 10**27, 2)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (OSError(errno.EROFS, "x"), "the file system is read-only"),
        (OSError(errno.EDQUOT, "x"), "the disk quota is used up"),
        (OSError(errno.ENOTDIR, "x"), "Not a directory"),
        (
            RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing\n more"),
            "full disk",
        ),
    ],
)
def test_what_the_system_says_is_told_in_words(error: Exception, says: str) -> None:
    assert run_folder.is_write_error(error)
    assert says in run_folder.explain(error)
    assert not run_folder.is_write_error(RuntimeError("shapes do not fit"))


# During training


@pytest.fixture
def run(make_generator: Any, reward: Any, pairs: Any, settings: Any, tmp_path: Path) -> Callable[..., SRReFLTrainer]:
    def make(steps: int, *callbacks: TrainerCallback) -> SRReFLTrainer:
        keywords = settings(max_steps=steps, save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "run"))
        return SRReFLTrainer(
            make_generator(),
            reward,
            args=SRReFLConfig(**keywords),
            train_dataset=pairs(4),
            callbacks=list(callbacks),
        )

    return make


class LimitFrom(TrainerCallback):
    """Limits the size of files from one step on, until another."""

    def __init__(self, size: int, first: int, last: int) -> None:
        self.size, self.first, self.last = size, first, last
        self.limit: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.first:
            self.limit = largest_file(self.size)
            self.limit.__enter__()
        if state.global_step == self.last and self.limit is not None:
            self.lift()

    def lift(self) -> None:
        if self.limit is not None:
            self.limit.__exit__(None, None, None)
            self.limit = None


def largest_written(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("level", range(12))
def test_old_checkpoints_survive_a_disk_that_is_full(run: Callable[..., SRReFLTrainer], level: int) -> None:
    run(2).train()
    folder = Path(run(2).args.output_dir)
    before = [path.name for path in checkpointing.list_checkpoints(folder)]
    # From the first bytes of the manifest to one byte short of the largest file.
    limit = LimitFrom(max(1, largest_written(folder / "checkpoint-2") * (level + 1) // 12 - 1), 3, 6)
    trainer = run(6, limit)
    try:
        with pytest.raises(
            CheckpointError, match=r"checkpoint-5 could not be written.*the checkpoints before are intact"
        ):
            trainer.train()
    finally:
        limit.lift()
    assert [path.name for path in checkpointing.list_checkpoints(folder)] == before
    for path in checkpointing.list_checkpoints(folder):
        checkpointing.verify(path)
    assert not list(folder.glob(".tmp*"))
    resumed = run(6)
    resumed.train()
    assert resumed.state.global_step == 6


def test_a_trainer_does_not_write_to_the_folder_of_another(
    run: Callable[..., SRReFLTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run(2)
    held = run_folder.lock_run_folder(Path(trainer.args.output_dir))
    monkeypatch.setattr(run_folder.lock_run_folder, "__defaults__", (0.0,))
    with pytest.raises(SetupError, match="another run"):
        trainer.train()
    assert not checkpointing.list_checkpoints(trainer.args.output_dir)
    held.release()
    trainer.train()
    assert run_folder.lock_run_folder(Path(trainer.args.output_dir)).is_locked


def test_a_save_that_fails_once_does_not_end_the_run(
    run: Callable[..., SRReFLTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    run(1).train()
    limit = LimitFrom(largest_written(Path(run(1).args.output_dir) / "checkpoint-1") // 2, 2, 2)
    try:
        with caplog.at_level("ERROR"):
            trainer = run(4, limit)
            trainer.train()
    finally:
        limit.lift()
    names = [path.name for path in checkpointing.list_checkpoints(trainer.args.output_dir)]
    assert names == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert "checkpoint-2 could not be written: " in caplog.text

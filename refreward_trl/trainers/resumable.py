"""What a long run needs, whatever it trains: it goes on bit by bit where it stopped, keeps its metrics without gap or
duplicate, and never steps on a number that is not finite."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from filelock import FileLock
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from refreward_trl import callbacks as our_callbacks
from refreward_trl.checkpointing import MIN_KEPT
from refreward_trl.checksums import checksums
from refreward_trl.errors import TrainingError
from refreward_trl.trainers.checkpoint_hooks import VerifiedCheckpoints
from refreward_trl.trainers.recorder import MetricRecorder
from refreward_trl.trainers.run_folder import DISK_ERRORS, check_space, lock_run_folder, unwritable
from refreward_trl.trainers.sharding import is_sharded

LOST_RANK = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Read error",
    "Write error",
    "Timed out waiting",
    "gloo",
)
"""Parts of what gloo says when another rank is gone or does not answer; NCCL has classes of errors."""


class ResumableTrainer(VerifiedCheckpoints):
    """A Trainer whose runs can be interrupted: it keeps what was recorded, the clock, and the samples of an update.

    `args` must have `resume`: "auto", "never" or a folder. The constructor is that of `transformers.Trainer`.
    """

    def __init__(self, *arguments: Any, callbacks: list[TrainerCallback] | None = None, **keywords: Any) -> None:
        self._recorder = MetricRecorder()
        self._seconds = 0.0
        self._started_at: float | None = None
        self._resumed_from: Path | None = None
        try:
            super().__init__(*arguments, callbacks=[our_callbacks.MetricsWriter(), *(callbacks or [])], **keywords)
        except OSError as error:  # the Trainer makes the run's folder
            if error.errno in DISK_ERRORS and error.filename:
                raise unwritable(error.filename, error) from error
            raise
        # The samples of one update, which an error names.
        self._step_sample_ids: deque[str] = deque(
            maxlen=self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        )
        self.add_callback(_WeightsWatch(self))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Trains, from the checkpoint that `args.resume` (or `resume_from_checkpoint`, if given) chooses."""
        with self._naming_lost_ranks(), self._own_folder():
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(self, resume_from_checkpoint: str | bool | None, *others: Any) -> TrainOutput:
        folder = self._resume_folder(resume_from_checkpoint, self.args.resume)
        self._resumed_from = folder
        if folder is not None:
            self._load_extra_state(folder)
        self._started_at = time.monotonic()
        eval_on_start, self.args.eval_on_start = self.args.eval_on_start, self.args.eval_on_start and folder is None
        try:
            return super().train(None if folder is None else str(folder), *others)
        finally:
            self.args.eval_on_start = eval_on_start
            self._seconds, self._started_at = self._elapsed(), None

    @contextmanager
    def _naming_lost_ranks(self) -> Iterator[None]:
        """Inside, what a collective call says when another rank is gone becomes an error that can be read."""
        try:
            yield
        except RuntimeError as error:
            if self.args.world_size > 1 and _lost_a_rank(error):
                raise self._alone(error) from error
            raise

    def _alone(self, error: RuntimeError) -> TrainingError:
        own, ranks = self.args.process_index, self.args.world_size
        other = f"rank {1 - own}" if ranks == 2 else f"one of the {ranks - 1} other ranks"
        return TrainingError(
            f"rank {own} has lost {other}, which died or does not answer (own samples: "
            f"{', '.join(self._step_sample_ids)}): {str(error).strip().splitlines()[0]}",
            where=f"step {self.state.global_step + 1}",
            fix="look for the message of the rank that ended first, then run the same command again",
        )

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        """Inside, this run alone writes to its folder, which has room for its checkpoints."""
        locks: list[FileLock] = []

        def prepare() -> None:
            locks.append(lock_run_folder(self._run_folder))
            if self.args.save_strategy != "no":
                kept = max(MIN_KEPT, self.args.save_total_limit or MIN_KEPT)
                check_space(self._run_folder, self._checkpoint_bytes(), kept)

        try:
            self._from_rank_zero(prepare)
            yield
        finally:
            for lock in locks:
                lock.release()

    def _checkpoint_bytes(self) -> int:
        """Returns about how large a checkpoint is: the weights that change and two moments of each."""
        weights = self._changing_weights(self.model.state_dict()).values()
        return sum(weight.numel() * (weight.element_size() + 2 * 4) for weight in weights)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with what was recorded since the last training line."""
        if "loss" in logs:
            # The recorded loss replaces the Trainer's own mean, which starts anew after a resume.
            logs |= self._recorder.flush(self._gather)
        super().log(logs, start_time)

    def _write_extra_state(self, folder: Path) -> dict[str, Any]:
        metrics_file = our_callbacks.metrics_path(self._run_folder)
        return {
            **super()._write_extra_state(folder),
            "recorder": self._recorder.state(),
            "seconds": self._elapsed(),
            "metrics_bytes": metrics_file.stat().st_size if metrics_file.exists() else 0,
        }

    def _read_extra_state(self, folder: Path, state: dict[str, Any]) -> None:
        super()._read_extra_state(folder, state)
        self._recorder.load_state(state["recorder"])
        self._seconds = float(state["seconds"])
        if self.is_world_process_zero():
            our_callbacks.truncate_metrics(self._run_folder, int(state["metrics_bytes"]))

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._started_at is None else time.monotonic() - self._started_at)

    def _require_finite(self, what: str, values: Tensor, sample_ids: Sequence[str]) -> None:
        """Stops all ranks if a value of one of them is not finite, and names its samples."""
        bad = ~torch.isfinite(values.detach()).all()
        if not self._any_rank(bad):
            return
        named = ", ".join(sorted(set(self._gather([str(name) for name in sample_ids] if bool(bad) else []))))
        raise TrainingError(
            f"the {what} is not finite (samples: {named}); nothing was updated",
            where=f"step {self.state.global_step + 1}",
            fix="look at these samples and at the metrics before; lower learning_rate or set max_grad_norm",
        )

    def _require_finite_gradient(self, norm: Any) -> None:
        self._require_finite("gradient", torch.as_tensor(norm), self._step_sample_ids)

    def _require_equal_ranks(self) -> None:
        """Stops all ranks if the weights of one are not those of rank 0, and names rank and tensor."""
        weights = self._changing_weights(dict(self.model.named_parameters()))
        weights = {name: weight for name, weight in weights.items() if not is_sharded(weight)}
        if not weights:
            return
        own = checksums(weights).to(self.accelerator.device)
        ranks = self.accelerator.gather(own[None])
        different = (ranks != ranks[0]).nonzero().tolist()
        if different:
            rank, number = different[0]
            raise TrainingError(
                f"the weights of rank {rank} are not those of rank 0: {list(weights)[number]} and "
                f"{len({number for _, number in different}) - 1} other tensors differ",
                where=f"step {self.state.global_step}",
                fix="resume from a checkpoint before that step; a device or a network card may be faulty",
            )

    def _any_rank(self, flag: Tensor) -> bool:
        count = flag.to(self.accelerator.device, torch.float32)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, "sum")
        return bool(count > 0)

    def _gather(self, own: Sequence[Any]) -> list[Any]:
        """Concatenates the lists of all ranks."""
        return gather_object(list(own)) if self.args.world_size > 1 else list(own)


def _lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because of the other side."""
    return isinstance(error, torch.distributed.DistError) or any(text in str(error) for text in LOST_RANK)


class _WeightsWatch(TrainerCallback):
    """Compares the weights with the checkpoint that was loaded, and now and then those of the ranks."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._resumed_from is not None:
            self._trainer._check_loaded_weights(self._trainer._resumed_from)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = args.rank_check_steps
        if every and args.world_size > 1 and state.global_step % every == 0:
            self._trainer._require_equal_ranks()

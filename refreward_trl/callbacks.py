"""What watches a run: the metrics file, the image grid and the alarm against reward hacking."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from refreward_trl.data.images import to_pil, write_png
from refreward_trl.errors import DISK_ERRORS, ConfigError, SetupError
from refreward_trl.generators.base import Generator
from refreward_trl.resampling import upscale

METRICS_FILE = "metrics.jsonl"
IMAGE_FOLDER = "images"
GRID_GAP = 4

logger = logging.get_logger(__name__)


def metrics_path(output_dir: str | Path) -> Path:
    """Returns where a run writes its metrics."""
    return Path(output_dir) / METRICS_FILE


def check_metrics_file(path: Path) -> None:
    """Raises `ConfigError` if the metrics would be written through a link: to a file that may lie anywhere, where
    the folder of the run came from somebody else."""
    if path.is_symlink():
        raise ConfigError("it is a link", where=str(path), fix="delete it, or choose another output_dir")


def truncate_metrics(output_dir: str | Path, size: int) -> None:
    """Cuts the metrics file back to `size` bytes, its length when the checkpoint that a run goes on from was written.

    What came after belongs to steps that will be done again. Raises `ConfigError` as `check_metrics_file`.
    """
    path = metrics_path(output_dir)
    check_metrics_file(path)
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


class MetricsWriter(TrainerCallback):
    """Appends every log to `output_dir/metrics.jsonl`: one JSON object per line with `step`, `time` (Unix seconds) and
    the metrics.

    Undefined numbers are null. The closing figures of a `train()` call are left out: they describe the call, not the
    run.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        path = metrics_path(args.output_dir)
        check_metrics_file(path)
        if state.global_step == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        numbers = {name: _jsonable(value) for name, value in logs.items()}
        line = {"step": state.global_step, "time": time.time(), **numbers}
        path = metrics_path(args.output_dir)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            # Going on would leave a gap; a resumed run cuts off what was written of the line.
            raise SetupError(
                f"the metrics of step {state.global_step} cannot be written: "
                f"{DISK_ERRORS.get(error.errno or 0, str(error))}",
                where=str(path),
                fix="make room, then run the same command again: it goes on from the newest checkpoint",
            ) from error


class Painter(Protocol):
    """What the image grid needs of a trainer."""

    generator: Generator
    eval_dataset: Any
    model_wrapped: Any
    accelerator: Any
    callback_handler: Any

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside, the model holds the weights that are evaluated and saved."""
        ...


class ImageGridCallback(TrainerCallback):
    """Draws the first evaluation images every `log_image_steps` updates: LR (enlarged by bicubic) | before | now | HR,
    one row each.

    The grid goes to `output_dir/images/step-<n>.png` and to TensorBoard, Weights & Biases and trackio where
    `report_to` names them.

    Args:
        trainer: The trainer whose generator draws.
    """

    def __init__(self, trainer: Painter) -> None:
        self.trainer = trainer
        self._rows: list[dict[str, Tensor]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dataset = self.trainer.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        self._rows = []
        for index in range(min(args.num_log_images, len(dataset))):
            columns = dataset[index]
            row = {name: _batch_of_one(columns[name]) for name in ("lr_image", "hr_image") if name in columns}
            self._rows.append({**row, "before": self._generate(row["lr_image"])})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._rows or state.global_step % args.log_image_steps:
            return
        # Every rank draws, since a sharded model needs them all; one writes.
        strips = [self._strip(row) for row in self._rows]
        if not state.is_world_process_zero:
            return
        grid = _stack(strips, dim=1)
        folder = Path(args.output_dir) / IMAGE_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"step-{state.global_step}.png", grid)
        self._send(args.report_to, grid, state.global_step)

    def _strip(self, row: Mapping[str, Tensor]) -> Tensor:
        lr_image = row["lr_image"].float()
        images = [upscale(lr_image, self.trainer.generator.scale), row["before"], self._generate(row["lr_image"])]
        if "hr_image" in row:
            images.append(row["hr_image"])
        return _stack([image[0] for image in images], dim=2)

    def _generate(self, lr_image: Tensor) -> Tensor:
        trainer = self.trainer
        device = trainer.accelerator.device
        with trainer.averaged_weights():
            return trainer.generator.generate(lr_image.to(device), model=trainer.model_wrapped).float().cpu()

    def _send(self, trackers: Sequence[str], grid: Tensor, step: int) -> None:
        """Shows the grid in the trackers that the Trainer has opened."""
        if "tensorboard" in trackers:
            for callback in self.trainer.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    callback.tb_writer.add_image("images", grid, step)
        if "wandb" in trackers:
            import wandb  # pyright: ignore[reportMissingImports] (the user's choice)

            wandb.log({"images": wandb.Image(to_pil(grid)), "train/global_step": step})
        if "trackio" in trackers:
            import trackio  # pyright: ignore[reportMissingImports] (the user's choice)

            trackio.log({"images": trackio.Image(to_pil(grid)), "train/global_step": step})


class HackingAlarm(TrainerCallback):
    """Stops training when the reward that is optimised rises while what is not optimised falls.

    An evaluation is suspicious if `eval_reward` is above its start, and a held-out reward is below its start by more
    than `hacking_heldout_margin`, or `eval_lr_psnr` by more than `hacking_psnr_margin` dB. After `hacking_patience`
    suspicious evaluations in a row the run stops. The start is the run's first evaluation, so use `eval_on_start`.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Read from the history, which checkpoints carry: the count survives a resume.
        evaluations = [line for line in state.log_history if "eval_reward" in line]
        if not evaluations:
            return
        start, suspicious = evaluations[0], 0
        for line in reversed(evaluations[1:]):
            if not hacking_signs(start, line, args.hacking_heldout_margin, args.hacking_psnr_margin):
                break
            suspicious += 1
        if suspicious >= args.hacking_patience:
            signs = hacking_signs(start, evaluations[-1], args.hacking_heldout_margin, args.hacking_psnr_margin)
            logger.warning(f"stopping at step {state.global_step}: eval_reward rises while {' and '.join(signs)} fall")
            control.should_training_stop = True


def hacking_signs(
    start: Mapping[str, float], now: Mapping[str, float], heldout_margin: float, psnr_margin: float
) -> list[str]:
    """Returns the names of the numbers that fell while `eval_reward` rose; empty if it did not rise."""
    if not now["eval_reward"] > start["eval_reward"]:
        return []
    margins = {name: heldout_margin for name in start if name.startswith("eval_heldout/")}
    if "eval_lr_psnr" in start:
        margins["eval_lr_psnr"] = psnr_margin
    return [name for name, margin in margins.items() if now.get(name, math.inf) < start[name] - margin]


def _jsonable(value: Any) -> Any:
    number = value.item() if isinstance(value, Tensor) else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _batch_of_one(image: Tensor) -> Tensor:
    return (image.float() / 255 if image.dtype == torch.uint8 else image.float())[None]


def _stack(images: Sequence[Tensor], dim: int) -> Tensor:
    """Puts `(3, H, W)` images side by side (dim 2) or one below the other (dim 1) on white, with a gap."""
    across = 3 - dim
    extent = max(image.shape[across] for image in images)
    padded = []
    for image in images:
        pad = [0, 0, 0, 0]
        pad[1 if across == 2 else 3] = extent - image.shape[across]
        pad[1 if dim == 2 else 3] = GRID_GAP
        padded.append(F.pad(image.float().clamp(0, 1).cpu(), pad, value=1.0))
    return torch.cat(padded, dim=dim)

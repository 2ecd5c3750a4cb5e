"""The metrics file, the image grid and the alarm against reward hacking."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from refreward_trl import callbacks


def state(step: int = 1, history: list[dict[str, float]] | None = None) -> TrainerState:
    return TrainerState(global_step=step, log_history=history or [], is_world_process_zero=True)


def test_every_log_is_one_line_of_json(tmp_path: Path) -> None:
    args = SimpleNamespace(output_dir=str(tmp_path))
    writer = callbacks.MetricsWriter()
    writer.on_train_begin(args, state(0), TrainerControl())
    writer.on_log(args, state(1), TrainerControl(), logs={"loss": 0.5, "kl": math.nan, "norm": torch.tensor(2.0)})
    writer.on_log(args, state(1), TrainerControl(), logs={"train_runtime": 3.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 1
    assert lines[0].pop("time") > 0
    assert lines[0] == {"step": 1, "loss": 0.5, "kl": None, "norm": 2.0}


def test_a_new_run_starts_a_new_file_and_a_resumed_one_does_not(tmp_path: Path) -> None:
    args = SimpleNamespace(output_dir=str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("old\n")
    callbacks.MetricsWriter().on_train_begin(args, state(3), TrainerControl())
    assert (tmp_path / "metrics.jsonl").read_text() == "old\n"
    callbacks.MetricsWriter().on_train_begin(args, state(0), TrainerControl())
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_only_one_rank_writes(tmp_path: Path) -> None:
    other = TrainerState(global_step=0, is_world_process_zero=False)
    callbacks.MetricsWriter().on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), other, TrainerControl())
    assert not list(tmp_path.iterdir())


def test_truncation_never_grows_a_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("one\ntwo\n")
    callbacks.truncate_metrics(tmp_path, 4)
    assert path.read_text() == "one\n"
    callbacks.truncate_metrics(tmp_path, 400)
    assert path.read_text() == "one\n"


def evaluation(reward: float, heldout: float, lr_psnr: float) -> dict[str, float]:
    return {"eval_reward": reward, "eval_heldout/outside": heldout, "eval_lr_psnr": lr_psnr, "step": 1}


START = evaluation(1.0, 0.5, 30.0)
GOOD = evaluation(2.0, 0.6, 29.9)
JUDGED_WORSE = evaluation(2.0, 0.1, 30.0)
INCONSISTENT = evaluation(2.0, 0.6, 28.0)
JUST_BAD = evaluation(0.5, 0.1, 28.0)


@pytest.mark.parametrize(
    ("history", "stops"),
    [
        ([START], False),
        ([START, JUDGED_WORSE], False),
        ([START, JUDGED_WORSE, JUDGED_WORSE], True),
        ([START, JUDGED_WORSE, INCONSISTENT], True),
        ([START, JUDGED_WORSE, GOOD, JUDGED_WORSE], False),
        ([START, JUST_BAD, JUST_BAD], False),
        ([START, {"loss": 1.0, "step": 2}, JUDGED_WORSE, {"loss": 1.0, "step": 3}, JUDGED_WORSE], True),
    ],
)
def test_the_alarm_needs_patience(history: list[dict[str, float]], stops: bool) -> None:
    args = SimpleNamespace(hacking_patience=2, hacking_heldout_margin=0.05, hacking_psnr_margin=0.5)
    control = TrainerControl()
    callbacks.HackingAlarm().on_evaluate(args, state(1, history), control)
    assert control.should_training_stop is stops


def test_margins_are_respected() -> None:
    assert callbacks.hacking_signs(START, INCONSISTENT, 0.0, 3.0) == []
    assert callbacks.hacking_signs(START, INCONSISTENT, 0.0, 0.5) == ["eval_lr_psnr"]
    assert callbacks.hacking_signs(START, JUDGED_WORSE, 0.5, 0.5) == []


def test_images_of_different_sizes_share_a_grid() -> None:
    grid = callbacks._stack([torch.zeros(3, 4, 6), torch.zeros(3, 2, 8)], dim=2)
    assert grid.shape == (3, 4, 6 + 8 + 2 * callbacks.GRID_GAP)
    assert float(grid[:, 3, -9:].min()) == 1
    column: Any = callbacks._stack([torch.zeros(3, 4, 6), torch.zeros(3, 2, 8)], dim=1)
    assert column.shape == (3, 4 + 2 + 2 * callbacks.GRID_GAP, 8)

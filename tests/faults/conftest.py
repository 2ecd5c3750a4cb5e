"""Runs in forked children that are killed where a test wants it, and what is left of them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from refreward_trl.reward_model.conv import ConvJudge
from refreward_trl.trainers.checksums import digest
from refreward_trl.trainers.ddpo_config import SRDDPOConfig
from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer
from refreward_trl.trainers.ref_reward_config import RefRewardConfig
from refreward_trl.trainers.ref_reward_trainer import RefRewardTrainer
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer

spec = importlib.util.spec_from_file_location("toys", Path(__file__).parents[1] / "trainers" / "conftest.py")
assert spec is not None and spec.loader is not None
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)

STEPS = 6
SAVE_STEPS = 2
TIMING = {"time", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
PATIENCE = 120.0
"""Seconds after which a child counts as hanging."""


class ToyGroups(Dataset):
    """Preference groups of three candidates; the more noise, the worse."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = toys.ToyPairs(7)[index]
        source = torch.Generator().manual_seed(index)
        noise = torch.randn(3, 3, 32, 32, generator=source) * torch.tensor([0.0, 40.0, 90.0]).view(3, 1, 1, 1)
        return {
            "sample_id": row["sample_id"],
            "lr_image": row["lr_image"],
            "candidates": (row["hr_image"].float() + noise).clamp(0, 255).byte(),
            "better_worse": torch.tensor([[0, 1], [0, 2], [1, 2]]),
            "kinds": ["hr", "mild", "severe"],
        }


def black_box(*, completions: torch.Tensor, **columns: Any) -> list[float]:
    return toys.brightness(completions=completions.detach()).tolist()


def make_trainer(kind: str, folder: Path, **changes: Any) -> Any:
    """Returns the trainer "refl-lora", "refl-full", "ddpo-lora", "ddpo-full", "rm-conv": tiny, with saves and logs."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        **changes,
    }
    method, _, part = kind.partition("-")
    if method == "rm":
        judge = ConvJudge(widths=(8, 16), hidden=8)
        return RefRewardTrainer(judge, RefRewardConfig(**settings), ToyGroups(), eval_dataset=ToyGroups())
    settings["ema_decay"] = 0.8
    adapter = toys.toy_lora() if part == "lora" else None
    data = {"train_dataset": toys.ToyPairs(7), "eval_dataset": toys.ToyPairs(2), "peft_config": adapter}
    if method == "refl":
        return SRReFLTrainer(toys.grey_generator(), toys.brightness, args=SRReFLConfig(**settings), **data)
    # Three updates per rollout: most kills happen inside one.
    rollout = {"num_generations": 4, "num_iterations": 3, "advantage": "running", "beta": 0.1}
    return SRDDPOTrainer(toys.grey_generator(), black_box, args=SRDDPOConfig(**settings, **rollout), **data)


def ending(trainer: Any) -> dict[str, Any]:
    """Returns all that must be equal at the end of two equal runs, as JSON."""
    moments = {
        f"{key}/{name}": tensor
        for key, state in trainer.optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }
    lines = [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    average = getattr(trainer, "average", None)
    return {
        "step": trainer.state.global_step,
        "weights": digest(trainer.model.state_dict()),
        "moments": digest(moments),
        "average": None if average is None else digest(average.state_dict()),
        "scheduler": repr(sorted(trainer.lr_scheduler.state_dict().items())),
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "metrics": [{name: value for name, value in line.items() if name not in TIMING} for line in lines],
    }


def in_child(action: Callable[[], Any], log: Path, kill_after: float | None = None) -> tuple[int, Any]:
    """Runs `action` in a forked child.

    Returns:
        Its exit code (negative: the signal that ended it), and what it returned, as JSON.
    """
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            result.write_text(json.dumps(action()))
            code = 0
        except BaseException as error:  # a child must never come back into the test
            traceback.print_exc()
            code = getattr(error, "exit_code", 1)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    started = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        elapsed = time.monotonic() - started
        if elapsed > (PATIENCE if kill_after is None else kill_after):
            os.kill(child, signal.SIGKILL)
            kill_after = PATIENCE
        time.sleep(0.002)
    assert time.monotonic() - started < PATIENCE, f"the child hung: {log.read_text()[-3000:]}"
    code = os.waitstatus_to_exitcode(status)
    return code, json.loads(result.read_text()) if code == 0 else None


@pytest.fixture
def harness() -> SimpleNamespace:
    """`make_trainer`, `ending` and `in_child` for tests, which cannot import a conftest."""
    return SimpleNamespace(make_trainer=make_trainer, ending=ending, in_child=in_child)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """A forked child must not find a pool of threads that only its parent has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

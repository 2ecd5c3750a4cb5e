"""Runs as users start them, by `accelerate launch`, all of whose processes can be found."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from refreward_trl.cli.packaged import packaged_folder
from refreward_trl.data.images import to_uint8, write_png

ROOT = Path(__file__).parents[1]
MARK = "REFREWARD_TEST_RUN"
"""The variable by whose value all processes of a run are found."""
PATIENCE = 600.0
"""Seconds after which a run counts as hanging; the machine may be ten times slower than usual."""

needs_deepspeed = pytest.mark.skipif(
    shutil.which("g++") is None or importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed compiles its communication at the first start",
)

RECIPE = """
method: refl
output_dir: run
generator: generator
dataset: photos
eval_dataset: photos
degradation: bicubic
crop_size: 32
max_eval_images: 2
max_steps: 2
save_steps: 2
per_device_train_batch_size: 2
learning_rate: 1e-3
rewards: [{name: psnr}]
"""


def furnish(place: Path) -> Path:
    """Puts three photos, a tiny generator and a recipe into a folder."""
    from refreward_trl.generators.tiny import build_tiny_generator

    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b", "c"):
        write_png(place / "photos" / f"{name}.png", to_uint8(torch.rand(3, 48, 48, generator=generator)))
    build_tiny_generator(vae_width=8, unet_channels=(8, 16)).save_pretrained(place / "generator")
    (place / "recipe.yaml").write_text(RECIPE)
    return place


def started(
    place: Path,
    launch_file: str | None,
    *words: str,
    log: Path | None = None,
    method: str = "refl",
    recipe: str = "recipe.yaml",
) -> subprocess.Popen:
    """Starts a run in a session of its own, by a launch file or without a launcher.

    Its output goes to pipes, or to the file `log`, which cannot fill up.
    """
    command = [sys.executable]
    if launch_file is not None:
        file = packaged_folder("deepspeed_configs") / launch_file
        command += ["-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0"]
    command += ["-m", "refreward_trl", method, "--config", recipe, *words]
    # DeepSpeed's ninja lies beside this Python, which need not be on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    mark = uuid.uuid4().hex
    environment = os.environ | {
        MARK: mark,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "DS_ACCELERATOR": "cpu",
        "PATH": path,
    }
    if log is None:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    else:
        output = {"stdout": log.open("w"), "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, text=True, **output)
    process.mark = mark  # type: ignore[attr-defined]
    return process


def ended(process: subprocess.Popen, timeout: float = 2 * PATIENCE) -> subprocess.CompletedProcess:
    """Waits for a run; kills all of its processes if it takes too long."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_until(true: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    """Waits for something that a run does."""
    patience = time.monotonic() + PATIENCE
    while not true():
        if process.poll() is not None or time.monotonic() > patience:
            kill_all(process)
            raise AssertionError(log.read_text()[-4000:])
        time.sleep(0.05)


def members(process: subprocess.Popen) -> list[int]:
    """Returns the living processes of a run: a launcher gives its ranks sessions of their own."""
    mark = f"{MARK}={process.mark}".encode()  # type: ignore[attr-defined]
    alive = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                alive.append(int(folder.name))
        except OSError:  # it has just ended, or is another user's
            continue
    return alive


def kill_all(process: subprocess.Popen) -> int:
    """Kills all processes of a run at once and returns how many there were."""
    alive = members(process)
    for number in alive:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()
    assert left_over(process) == []
    return len(alive)


def left_over(process: subprocess.Popen, patience: float = 60.0) -> list[int]:
    """Returns the processes of a run that are still there after a while: a data loader's workers take a moment."""
    until = time.monotonic() + patience
    while (alive := members(process)) and time.monotonic() < until:
        time.sleep(0.1)
    return alive

"""Launch files do what they say: two processes, wrapped, one result; a mistake is told once, before all that."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from refreward_trl import checkpointing
from refreward_trl.cli.packaged import packaged_folder
from refreward_trl.data.images import to_uint8, write_png

pytestmark = pytest.mark.slow

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


@pytest.fixture
def place(tmp_path) -> Path:
    from refreward_trl.generators.tiny import build_tiny_generator

    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b", "c"):
        write_png(tmp_path / "photos" / f"{name}.png", to_uint8(torch.rand(3, 48, 48, generator=generator)))
    build_tiny_generator(vae_width=8, unet_channels=(8, 16)).save_pretrained(tmp_path / "generator")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def started(place: Path, launch_file: str | None, *words: str) -> subprocess.Popen:
    """Starts a run in a session of its own, by a launch file or without a launcher."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable]
    if launch_file is not None:
        file = packaged_folder("deepspeed_configs") / launch_file
        command += ["-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0"]
    command += ["-m", "refreward_trl", "refl", "--config", "recipe.yaml", *words]
    # DeepSpeed's ninja lies beside this Python, which need not be on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root, "DS_ACCELERATOR": "cpu", "PATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **pipes)


def ended(process: subprocess.Popen, timeout: float = 1200) -> subprocess.CompletedProcess:
    """Waits for a run; kills all of its processes if it takes too long."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def launch(place: Path, launch_file: str, *words: str) -> subprocess.CompletedProcess:
    return ended(started(place, launch_file, *words))


@pytest.mark.parametrize(
    ("launch_file", "processes", "deepspeed"),
    [
        ("single.yaml", 1, False),
        ("ddp_cpu.yaml", 2, False),
        pytest.param("zero2.yaml", 2, True, marks=needs_deepspeed),
    ],
)
def test_a_launch_file_starts_its_processes_together(place, launch_file, processes, deepspeed):
    done = launch(place, launch_file)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((place / "run/summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["images"] == 2 * 2 * processes
    assert done.stdout.count("wrote run/summary.json") == 1
    checkpoint = place / "run/checkpoint-2"
    assert json.loads((checkpoint / "manifest.json").read_text())["world_size"] == processes
    # DeepSpeed's own shards show that it ran: accelerate can drop it without a word.
    assert any(checkpoint.rglob("*optim_states.pt")) is deepspeed


def test_a_mistake_is_told_once_and_before_anything_starts(place):
    done = launch(place, "ddp_cpu.yaml", "--learning_rte", "1")
    assert done.returncode != 0
    assert done.stderr.count("did you mean 'learning_rate'?") == 1
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("launch_file", "code"),
    [(None, 75), ("ddp_cpu.yaml", 1), pytest.param("zero2.yaml", 1, marks=needs_deepspeed)],
)
def test_a_signal_saves_the_run_which_then_goes_on(place, launch_file, code):
    """The signal goes to what was started, as from a scheduler: launchers pass SIGTERM on and return 1 themselves."""
    long = ("--max_steps", "100000", "--save_steps", "100000", "--logging_steps", "1")
    process = started(place, launch_file, *long)
    metrics, patience = place / "run/metrics.jsonl", time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= 2):
        assert process.poll() is None and time.monotonic() < patience, process.communicate()[1][-4000:]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process, timeout=120)
    assert stopped.returncode == code, stopped.stderr[-4000:]
    step = json.loads((place / "run/stopped.json").read_text())["step"]
    assert stopped.stderr.count(f"SIGTERM stopped the run after step {step}; checkpoint-{step} is complete") == 1
    assert checkpointing.verify(place / f"run/checkpoint-{step}")["step"] == step
    done = ended(started(place, launch_file, "--max_steps", str(step + 2)))
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"resuming from run/checkpoint-{step}" in done.stderr + done.stdout
    assert f"max_steps 100000 -> {step + 2}" in done.stderr + done.stdout
    assert json.loads((place / "run/summary.json").read_text())["steps"] == step + 2
    assert not (place / "run/stopped.json").exists()

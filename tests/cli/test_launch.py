"""Launch files do what they say: two processes, wrapped, one result; a mistake is told once, before all that."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import ended, furnish, needs_deepspeed, started

from refreward_trl import checkpointing

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path) -> Path:
    return furnish(tmp_path)


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

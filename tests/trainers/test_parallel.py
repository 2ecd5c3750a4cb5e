"""Two processes do what one does: DDP and DeepSpeed ZeRO-2 on the CPU, through the real launcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from refreward_trl import checkpointing

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("parallel_worker.py")
CONFIGS = REPOSITORY / "deepspeed_configs"
TIMEOUT = 900

pytestmark = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None, reason="needs deepspeed and a C++ compiler"
)


def launch(config: str | None, output: Path, *scenarios: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache/torch_extensions")),
    }
    launcher = [sys.executable]
    if config is not None:
        port = str(20000 + os.getpid() % 20000)
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
        launcher += ["--num_processes", "2", "--main_process_port", port]
    return subprocess.run(
        [*launcher, str(WORKER), str(output), *scenarios],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


class Result:
    """What one rank of a launched scenario saw."""

    def __init__(self, output: Path, scenario: str, rank: int = 0) -> None:
        folder = output / scenario
        self.facts: dict[str, Any] = json.loads((folder / f"facts-{rank}.json").read_text())
        self.tensors = safetensors.torch.load_file(folder / f"tensors-{rank}.safetensors")

    def part(self, name: str) -> dict[str, Tensor]:
        return {key.partition("/")[2]: value for key, value in self.tensors.items() if key.startswith(f"{name}/")}

    def gradient(self) -> Tensor:
        return flat(self.part("gradient"))

    def update(self) -> Tensor:
        return flat(self.part("end")) - flat(self.part("start"))


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def gradient_error(one: Result, other: Result) -> float:
    return float((one.gradient() - other.gradient()).norm() / one.gradient().norm())


def update_error(one: Result, other: Result) -> float:
    return float((one.update() - other.update()).norm() / one.update().norm())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Launches each configuration with its scenarios once."""
    done: dict[tuple[Any, ...], Path] = {}

    def get(config: str | None, *scenarios: str) -> Path:
        key = (config, *scenarios)
        if key not in done:
            output = tmp_path_factory.mktemp("launch")
            finished = launch(config, output, *scenarios)
            assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
            done[key] = output
        return done[key]

    return get


SAME = ("refl-sgd", "ddpo-sgd", "vae-sgd", "refl-adamw", "ddpo-adamw")
WRONG = ("unwrapped", "unwrapped-unchecked", "nan", "nan-gradient", "failing-reward", "drift", "preempted")


@pytest.fixture(scope="module")
def single(runs: Callable[..., Path]) -> Path:
    return runs(None, *SAME)


@pytest.mark.parametrize("scenario", ["refl-sgd", "ddpo-sgd", "vae-sgd"])
def test_ddp_equals_one_process(runs: Callable[..., Path], single: Path, scenario: str) -> None:
    one, two = Result(single, scenario), Result(runs("ddp_cpu.yaml", *SAME), scenario)
    assert (one.facts["world_size"], two.facts["world_size"]) == (1, 2)
    assert gradient_error(one, two) < 1e-5
    assert update_error(one, two) < 1e-4


@pytest.mark.parametrize("scenario", ["refl-adamw", "ddpo-adamw"])
def test_ddp_loss_curves_agree(runs: Callable[..., Path], single: Path, scenario: str) -> None:
    one, two = Result(single, scenario), Result(runs("ddp_cpu.yaml", *SAME), scenario)
    assert len(one.facts["losses"]) == 6
    assert two.facts["losses"] == pytest.approx(one.facts["losses"], rel=1e-3, abs=1e-5)
    assert two.facts["evaluations"] == pytest.approx(one.facts["evaluations"], rel=1e-5)


def test_ranks_hold_the_same_weights(runs: Callable[..., Path]) -> None:
    output = runs("ddp_cpu.yaml", *SAME)
    for scenario in SAME:
        first, second = (Result(output, scenario, rank).part("end") for rank in (0, 1))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@needs_deepspeed
@pytest.mark.parametrize("scenario", ["refl-sgd", "ddpo-sgd"])
def test_zero2_equals_one_process(runs: Callable[..., Path], single: Path, scenario: str) -> None:
    one, two = Result(single, scenario), Result(runs("zero2.yaml", scenario), scenario)
    assert two.facts["distributed_type"] == "DistributedType.DEEPSPEED"
    assert two.facts["world_size"] == 2
    assert gradient_error(one, two) < 1e-5
    assert update_error(one, two) < 1e-4


@needs_deepspeed
@pytest.mark.parametrize("scenario", ["refl-adamw", "ddpo-adamw"])
def test_zero2_loss_curves_agree(runs: Callable[..., Path], single: Path, scenario: str) -> None:
    one, two = Result(single, scenario), Result(runs("zero2.yaml", scenario), scenario)
    assert two.facts["losses"] == pytest.approx(one.facts["losses"], rel=1e-3, abs=1e-5)
    assert two.facts["evaluations"] == pytest.approx(one.facts["evaluations"], rel=1e-5)


def test_a_loss_on_the_unwrapped_module_is_refused(runs: Callable[..., Path]) -> None:
    for rank in (0, 1):
        error = Result(runs("ddp_cpu.yaml", *WRONG), "unwrapped", rank).facts["error"]
        assert error["kind"] == "SetupError"
        assert "without the prepared model" in error["message"]


def test_a_loss_on_the_unwrapped_module_fails_the_comparison(runs: Callable[..., Path], single: Path) -> None:
    """What the refusal protects from; and the proof that the comparison above can fail."""
    one = Result(single, "refl-sgd")
    output = runs("ddp_cpu.yaml", *WRONG)
    first, second = (Result(output, "unwrapped-unchecked", rank) for rank in (0, 1))
    assert gradient_error(one, first) > 1e-2
    assert update_error(one, first) > 1e-2
    assert not torch.equal(flat(first.part("end")), flat(second.part("end")))


def assert_stopped_together(output: Path, scenario: str, step: int) -> None:
    ranks = [Result(output, scenario, rank) for rank in (0, 1)]
    for rank in ranks:
        assert rank.facts["error"]["kind"] == "TrainingError"
        assert "photo" in rank.facts["error"]["message"]
        assert rank.facts["step"] == step
        assert bool(flat(rank.part("end")).isfinite().all())
    assert torch.equal(flat(ranks[0].part("end")), flat(ranks[1].part("end")))


@pytest.mark.parametrize("scenario", ["nan", "nan-gradient"])
def test_all_ranks_stop_at_a_number_that_is_not_finite(runs: Callable[..., Path], scenario: str) -> None:
    assert_stopped_together(runs("ddp_cpu.yaml", *WRONG), scenario, 1)


def test_ranks_that_have_drifted_apart_stop(runs: Callable[..., Path]) -> None:
    """The bit flips after step 2; the ranks compare their weights every other step."""
    for rank in (0, 1):
        facts = Result(runs("ddp_cpu.yaml", *WRONG), "drift", rank).facts
        assert facts["step"] == 4
        assert facts["error"]["kind"] == "TrainingError"
        assert "the weights of rank 1 are not those of rank 0: " in facts["error"]["message"]


def test_all_ranks_stop_at_the_signal_of_one(runs: Callable[..., Path]) -> None:
    output = runs("ddp_cpu.yaml", *WRONG)
    for rank in (0, 1):
        facts = Result(output, "preempted", rank).facts
        assert (facts["step"], facts["error"]["kind"]) == (4, "Preempted")
        assert "SIGTERM stopped the run after step 4; checkpoint-4 is complete" in facts["error"]["message"]
    assert checkpointing.verify(output / "preempted" / "run" / "checkpoint-4")["step"] == 4


def test_all_ranks_stop_when_one_reward_raises(runs: Callable[..., Path]) -> None:
    for rank in (0, 1):
        error = Result(runs("ddp_cpu.yaml", *WRONG), "failing-reward", rank).facts["error"]
        assert error["kind"] == "RewardError"
        assert "the server is gone" in error["message"]


@needs_deepspeed
@pytest.mark.parametrize("scenario", ["nan", "nan-gradient"])
def test_zero2_stops_before_the_step(runs: Callable[..., Path], scenario: str) -> None:
    """Under DeepSpeed the optimizer steps inside backward."""
    assert_stopped_together(runs("zero2.yaml", scenario), scenario, 1)


@pytest.mark.parametrize("config", ["ddp_cpu.yaml", pytest.param("zero2.yaml", marks=needs_deepspeed)])
def test_two_processes_resume_in_the_middle_of_a_rollout(
    runs: Callable[..., Path], tmp_path: Path, config: str
) -> None:
    """The checkpoint at step 3 lies between the two updates of a rollout."""
    whole = runs(config, "resumable")
    shutil.copytree(whole / "resumable" / "run" / "checkpoint-3", tmp_path / "resumable" / "run" / "checkpoint-3")
    finished = launch(config, tmp_path, "resumable")
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    assert "resuming from" in finished.stdout + finished.stderr
    for rank in (0, 1):
        one, other = Result(whole, "resumable", rank), Result(tmp_path, "resumable", rank)
        for part in ("end", "average"):
            assert torch.equal(flat(one.part(part)), flat(other.part(part)))
        assert one.facts["losses"] == other.facts["losses"]

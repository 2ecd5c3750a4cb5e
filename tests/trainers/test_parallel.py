"""Two processes do what one does: DDP and DeepSpeed ZeRO-1, 2 and 3 on the CPU, through the real launcher."""

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
from diffusers import UNet2DConditionModel
from torch import Tensor

from refreward_trl import checkpointing
from refreward_trl.generators.tiny import build_tiny_generator
from refreward_trl.reward_model.loading import load_judge

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("parallel_worker.py")
CONFIGS = REPOSITORY / "deepspeed_configs"
TIMEOUT = 1800

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
        # DeepSpeed's ninja lies beside this Python, which need not be on the path.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
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


SEEDED = tuple(f"{name}{seed}" for seed in ("", "-1", "-2") for name in ("refl-sgd", "ddpo-sgd"))
OTHER = ("vae-sgd", "full-kl-sgd", "judge-sgd", "refl-adamw", "ddpo-adamw", "aligned")
WRONG = ("unwrapped", "unwrapped-unchecked", "nan", "nan-gradient", "failing-reward", "drift")
STOPPED = ("preempted", "killed")
SCENARIOS: dict[str | None, tuple[str, ...]] = {
    None: (*SEEDED, *OTHER),
    "ddp_cpu.yaml": (*SEEDED, *OTHER, *WRONG, "resumable", *STOPPED),
    "zero1.yaml": (*SEEDED, "refl-adamw"),
    "zero2.yaml": (
        *SEEDED,
        *("judge-sgd", "refl-adamw", "ddpo-adamw", "nan", "nan-gradient", "judge-nan-gradient", "resumable"),
        *STOPPED,
    ),
    "zero3.yaml": (
        *SEEDED,
        *("full-kl-sgd", "judge-sgd", "refl-adamw", "aligned", "nan", "nan-gradient", "resumable"),
        *STOPPED,
    ),
}
"""What each launch file runs, in one launch; "killed" ends it."""
ZERO = [pytest.param(f"zero{stage}.yaml", marks=needs_deepspeed) for stage in (1, 2, 3)]
SAVING = ["ddp_cpu.yaml", *ZERO[1:]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """Launches each configuration once, with all of its scenarios."""
    done: dict[str | None, tuple[Path, str | None]] = {}

    def get(config: str | None) -> Path:
        if config not in done:
            output = tmp_path_factory.mktemp("launch")
            done[config] = output, _problem(launch(config, output, *SCENARIOS[config]), output, SCENARIOS[config])
        output, problem = done[config]
        assert problem is None, problem
        return output

    return get


def _problem(finished: subprocess.CompletedProcess[str], output: Path, scenarios: tuple[str, ...]) -> str | None:
    """Returns what was printed if a launch did not end as its scenarios should."""
    killed = "killed" in scenarios
    complete = all((output / name / "facts-0.json").is_file() for name in scenarios if name != "killed")
    as_planned = complete and bool(finished.returncode) is killed
    return None if as_planned else finished.stdout[-3000:] + finished.stderr[-6000:]


@pytest.fixture(scope="module")
def single(runs: Callable[..., Path]) -> Path:
    return runs(None)


def assert_same_training(one: Result, two: Result) -> None:
    assert (one.facts["world_size"], two.facts["world_size"]) == (1, 2)
    assert (one.facts["error"], two.facts["error"]) == (None, None)
    gradient, update = gradient_error(one, two), update_error(one, two)
    print(f"gradient {gradient:.1e}, update {update:.1e}")
    assert gradient < 1e-5
    assert update < 1e-4


@pytest.mark.parametrize("scenario", [*SEEDED, "vae-sgd", "full-kl-sgd"])
def test_ddp_equals_one_process(runs: Callable[..., Path], single: Path, scenario: str) -> None:
    assert_same_training(Result(single, scenario), Result(runs("ddp_cpu.yaml"), scenario))


@pytest.mark.parametrize("scenario", SEEDED)
@pytest.mark.parametrize("config", ZERO)
def test_zero_equals_one_process(runs: Callable[..., Path], single: Path, config: str, scenario: str) -> None:
    assert_same_training(Result(single, scenario), Result(runs(config), scenario))


@needs_deepspeed
def test_all_weights_can_be_trained_in_shards(runs: Callable[..., Path], single: Path) -> None:
    assert_same_training(Result(single, "full-kl-sgd"), Result(runs("zero3.yaml"), "full-kl-sgd"))


def test_seeds_differ(single: Path) -> None:
    """Three equal runs would prove no more than one."""
    for name in ("refl-sgd", "ddpo-sgd"):
        gradients = [Result(single, f"{name}{seed}").gradient() for seed in ("", "-1", "-2")]
        assert not any(torch.equal(gradients[0], other) for other in gradients[1:])


CURVES = [
    pytest.param(config, scenario, marks=needs_deepspeed if config.startswith("zero") else ())
    for config, scenarios in SCENARIOS.items()
    for scenario in scenarios
    if config is not None and scenario.endswith("-adamw")
]


@pytest.mark.parametrize(("config", "scenario"), CURVES)
def test_loss_curves_agree(runs: Callable[..., Path], single: Path, config: str, scenario: str) -> None:
    one, two = Result(single, scenario), Result(runs(config), scenario)
    assert len(one.facts["losses"]) == 6
    assert two.facts["losses"] == pytest.approx(one.facts["losses"], rel=1e-3, abs=1e-5)
    assert two.facts["evaluations"] == pytest.approx(one.facts["evaluations"], rel=1e-5)


def test_ranks_hold_the_same_weights(runs: Callable[..., Path]) -> None:
    output = runs("ddp_cpu.yaml")
    for scenario in (*SEEDED, *OTHER):
        first, second = (Result(output, scenario, rank).part("end") for rank in (0, 1))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# What a rank holds between two updates


@pytest.mark.parametrize("config", ZERO)
def test_deepspeed_is_really_on(runs: Callable[..., Path], config: str) -> None:
    for scenario in SEEDED:
        facts = Result(runs(config), scenario).facts
        assert facts["distributed_type"] == "DistributedType.DEEPSPEED"
        assert f"zero{facts['zero_stage']}.yaml" == config


@pytest.mark.parametrize("config", ["ddp_cpu.yaml", *ZERO])
def test_each_rank_holds_its_share_of_the_optimizer(runs: Callable[..., Path], config: str) -> None:
    shares = [Result(runs(config), "refl-adamw", rank).facts["sharding"]["share_of_moments"] for rank in (0, 1)]
    # ZeRO pads what cannot be halved.
    expected = (1.0, 1.0) if config == "ddp_cpu.yaml" else (0.5, 0.5)
    assert shares == pytest.approx(expected, abs=0.1 if config == "zero3.yaml" else 0.01)


@needs_deepspeed
@pytest.mark.parametrize("scenario", ["refl-sgd", "aligned", "full-kl-sgd", "judge-sgd"])
def test_only_what_is_trained_is_sharded(runs: Callable[..., Path], scenario: str) -> None:
    """Every parameter of the denoiser, also the frozen ones under an adapter; nothing of VAE, reference and judge."""
    for rank in (0, 1):
        held = Result(runs("zero3.yaml"), scenario, rank).facts["sharding"]
        assert held["not_available"] == held["empty"] == held["parameters"] > 0
        assert (held["outside"], held["outside_empty"]) == ([], [])
        assert (held["outside_parameters"] > 0) is (scenario != "judge-sgd")


@needs_deepspeed
def test_zero2_keeps_the_weights_whole(runs: Callable[..., Path]) -> None:
    held = Result(runs("zero2.yaml"), "refl-sgd").facts["sharding"]
    assert (held["not_available"], held["empty"]) == (0, 0)


# What is saved


@needs_deepspeed
def test_a_sharded_run_keeps_the_same_best_policy(runs: Callable[..., Path], single: Path) -> None:
    """KL, average, evaluations, a judge, pictures, the best model at the end."""
    one, two = Result(single, "aligned"), Result(runs("zero3.yaml"), "aligned")
    for name in ("losses", "evaluations", "heldout"):
        assert two.facts[name] == pytest.approx(one.facts[name], rel=1e-3, abs=1e-5)
    assert len(two.facts["heldout"]) == 3
    assert one.facts["best_step"] == two.facts["best_step"] > 0
    for part in ("end", "average"):
        assert torch.allclose(flat(one.part(part)), flat(two.part(part)), atol=1e-4)
    assert (runs("zero3.yaml") / "aligned" / "run" / "images" / "step-4.png").is_file()


@needs_deepspeed
def test_stock_libraries_open_a_policy_that_was_sharded(runs: Callable[..., Path]) -> None:
    folder = runs("zero3.yaml") / "aligned" / "run" / "generator"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
    name = {"adapter_name": "policy", "weight_name": "pytorch_lora_weights.safetensors"}
    unet.load_lora_adapter(folder / "policy", prefix=None, local_files_only=True, **name)
    loaded = {name: weight.detach() for name, weight in unet.named_parameters() if ".policy." in name}
    average = Result(runs("zero3.yaml"), "aligned").part("average")
    assert sorted(loaded) == sorted(average)
    assert all(torch.equal(weight, average[name]) for name, weight in loaded.items())
    base, untrained = unet.state_dict(), build_tiny_generator(vae_width=8, unet_channels=(8, 16)).unet.state_dict()
    assert all(torch.equal(base.get(name, base.get(_base(name))), weight) for name, weight in untrained.items())


def _base(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    return f"{layer}.base_layer.{kind}"


@pytest.mark.parametrize("config", ["ddp_cpu.yaml", *ZERO[1:]])
def test_a_judge_is_trained_and_saved(runs: Callable[..., Path], single: Path, config: str) -> None:
    one, two = Result(single, "judge-sgd"), Result(runs(config), "judge-sgd")
    assert two.facts["losses"] == pytest.approx(one.facts["losses"], rel=1e-5)
    assert update_error(one, two) < 1e-4
    judge = load_judge(runs(config) / "judge-sgd" / "judge")
    trained = {name.removeprefix("network."): tensor for name, tensor in two.part("end").items()}
    saved = dict(judge.model.named_parameters())
    assert all(torch.equal(saved[name], trained[name]) for name in saved)


# What goes wrong


def test_a_loss_on_the_unwrapped_module_is_refused(runs: Callable[..., Path]) -> None:
    for rank in (0, 1):
        error = Result(runs("ddp_cpu.yaml"), "unwrapped", rank).facts["error"]
        assert error["kind"] == "SetupError"
        assert "without the prepared model" in error["message"]


def test_a_loss_on_the_unwrapped_module_fails_the_comparison(runs: Callable[..., Path], single: Path) -> None:
    """What the refusal protects from; and the proof that the comparison above can fail."""
    one = Result(single, "refl-sgd")
    output = runs("ddp_cpu.yaml")
    first, second = (Result(output, "unwrapped-unchecked", rank) for rank in (0, 1))
    assert gradient_error(one, first) > 1e-2
    assert update_error(one, first) > 1e-2
    assert not torch.equal(flat(first.part("end")), flat(second.part("end")))


def assert_stopped_together(output: Path, scenario: str) -> None:
    ranks = [Result(output, scenario, rank) for rank in (0, 1)]
    for rank in ranks:
        assert rank.facts["error"]["kind"] == "TrainingError"
        assert "photo" in rank.facts["error"]["message"]
        assert rank.facts["step"] == 1
        assert bool(flat(rank.part("end")).isfinite().all())
    assert torch.equal(flat(ranks[0].part("end")), flat(ranks[1].part("end")))


@pytest.mark.parametrize("scenario", ["nan", "nan-gradient"])
@pytest.mark.parametrize("config", SAVING)
def test_all_ranks_stop_at_a_number_that_is_not_finite(runs: Callable[..., Path], config: str, scenario: str) -> None:
    """Before the step, also under DeepSpeed, whose optimizer steps inside backward."""
    assert_stopped_together(runs(config), scenario)


@needs_deepspeed
def test_a_judge_never_steps_on_a_gradient_that_is_not_finite(runs: Callable[..., Path]) -> None:
    assert_stopped_together(runs("zero2.yaml"), "judge-nan-gradient")


def test_ranks_that_have_drifted_apart_stop(runs: Callable[..., Path]) -> None:
    """The bit flips after step 2; the ranks compare their weights every other step."""
    for rank in (0, 1):
        facts = Result(runs("ddp_cpu.yaml"), "drift", rank).facts
        assert facts["step"] == 4
        assert facts["error"]["kind"] == "TrainingError"
        assert "the weights of rank 1 are not those of rank 0: " in facts["error"]["message"]


def test_all_ranks_stop_when_one_reward_raises(runs: Callable[..., Path]) -> None:
    for rank in (0, 1):
        error = Result(runs("ddp_cpu.yaml"), "failing-reward", rank).facts["error"]
        assert error["kind"] == "RewardError"
        assert "the server is gone" in error["message"]


# Stopping and going on


@pytest.mark.parametrize("config", SAVING)
def test_all_ranks_stop_at_the_signal_of_one(runs: Callable[..., Path], config: str) -> None:
    for rank in (0, 1):
        facts = Result(runs(config), "preempted", rank).facts
        assert (facts["step"], facts["error"]["kind"]) == (4, "Preempted")
        assert "SIGTERM stopped the run after step 4; checkpoint-4 is complete" in facts["error"]["message"]
    assert checkpointing.verify(runs(config) / "preempted" / "run" / "checkpoint-4")["step"] == 4


@pytest.fixture(scope="module")
def resumed(runs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Launches once more what was stopped by a signal, and what was killed."""
    done: dict[str, Path] = {}

    def get(config: str) -> Path:
        if config not in done:
            output = done[config] = tmp_path_factory.mktemp("resumed")
            for scenario in STOPPED:
                shutil.copytree(runs(config) / scenario / "run", output / scenario / "run")
            finished = launch(config, output, *STOPPED)
            assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
            for step in (4, 3):
                assert f"checkpoint-{step}\n" in finished.stdout + finished.stderr
        return done[config]

    return get


@pytest.mark.parametrize("scenario", STOPPED)
@pytest.mark.parametrize("config", SAVING)
def test_two_processes_go_on_bit_by_bit(
    runs: Callable[..., Path], resumed: Callable[[str], Path], config: str, scenario: str
) -> None:
    """The run that was killed goes on from step 3, between the two updates of a rollout."""
    for rank in (0, 1):
        one, other = Result(runs(config), "resumable", rank), Result(resumed(config), scenario, rank)
        assert one.facts["step"] == other.facts["step"] == 6
        assert other.facts["losses"] == one.facts["losses"]
        for part in ("end", "average"):
            assert torch.equal(flat(one.part(part)), flat(other.part(part)))


@needs_deepspeed
def test_another_number_of_processes_is_refused(runs: Callable[..., Path], tmp_path: Path) -> None:
    for config, scenario in (("ddp_cpu.yaml", "resumable"), ("zero2.yaml", "killed"), ("zero3.yaml", "preempted")):
        shutil.copytree(runs(config) / scenario / "run", tmp_path / scenario / "run")
    launch(None, tmp_path, "resumable", *STOPPED)
    for scenario in ("resumable", *STOPPED):
        error = Result(tmp_path, scenario).facts["error"]
        assert error["kind"] == "CheckpointError"
        assert "was written by 2 processes, this run has 1" in error["message"]
        assert "--num_processes 2" in error["message"]

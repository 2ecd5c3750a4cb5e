"""What every alignment trainer does: subclassing, accumulation, evaluation, stopping on bad numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refreward_trl import LossOutput
from refreward_trl.errors import ConfigError, DataError, RewardError, SetupError, TrainingError
from refreward_trl.generators import load_generator
from refreward_trl.trainers.alignment_config import AlignmentConfig
from refreward_trl.trainers.base import AlignmentTrainer, eval_mode
from refreward_trl.trainers.ddpo_config import SRDDPOConfig
from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer


class BrightenTrainer(AlignmentTrainer):
    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        cond = self.generator.prepare(batch["lr_image"])
        mean = self.generator.predict(self.generator.encode(cond), cond, model=model)
        image = self.generator.decode(mean, cond)
        with torch.no_grad(), self.reference():
            before = self.generator.decode(self.generator.predict(self.generator.encode(cond), cond), cond)
        return LossOutput(-image.mean(), {"brighter": (image - before).mean()})


@pytest.fixture
def make_trainer(make_generator: Any, reward: Any, pairs: Any, lora: Any, settings: Any) -> Callable[..., Any]:
    def make(
        kind: type[AlignmentTrainer] = SRReFLTrainer,
        *,
        rewards: Any = reward,
        config: type[AlignmentConfig] = SRReFLConfig,
        adapter: bool = True,
        heldout_rewards: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **changes: Any,
    ) -> Any:
        return kind(
            make_generator(),
            rewards,
            args=config(**settings(**changes)),
            train_dataset=train_dataset or pairs(8),
            eval_dataset=eval_dataset or pairs(3),
            peft_config=lora() if adapter else None,
            heldout_rewards=heldout_rewards,
        )

    return make


def test_a_subclass_with_its_own_objective_trains(make_trainer: Callable[..., Any], read_metrics: Any) -> None:
    trainer = make_trainer(BrightenTrainer, config=AlignmentConfig, rewards=None, max_steps=5)
    lr_image = trainer.train_dataset[0]["lr_image"][None] / 255
    before = trainer.generator.generate(lr_image).mean()
    trainer.train()
    assert trainer.generator.generate(lr_image).mean() > before + 0.001
    lines = read_metrics(trainer.args.output_dir)
    assert lines[0]["brighter"] == 0
    assert lines[-1]["brighter"] > 0


@pytest.mark.parametrize("adapter", [True, False])
def test_only_trainable_parameters_reach_the_optimizer(make_trainer: Callable[..., Any], adapter: bool) -> None:
    trainer = make_trainer(adapter=adapter)
    trainer.train()
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainer.generator.trainable_parameters()}
    assert not any(parameter.requires_grad for parameter in trainer.generator.vae.parameters())


@pytest.mark.parametrize(("kind", "config"), [(SRReFLTrainer, SRReFLConfig), (SRDDPOTrainer, SRDDPOConfig)])
def test_accumulation_changes_nothing(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: Any, config: Any
) -> None:
    gradients: dict[int, list[Tensor]] = {}
    for size in (4, 2, 1):

        class Spy(kind):
            def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None, key: int = size) -> Any:
                gradients[key] = [parameter.grad.clone() for parameter in self.generator_parameters()]
                return super()._get_grad_norm(model, grad_norm)

        # A wide policy: advantages divide the rewards' rounding errors by their spread. No residual noise: the network
        # is untrained, and a small direction magnifies rounding errors.
        wide = {"num_generations": 4, "scale_rewards": "batch", "sigma": 0.5, "noise": "lowfreq", "noise_cell": 4}
        changes = wide if kind is SRDDPOTrainer else {}
        make_trainer(
            Spy,
            config=config,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_grad_norm=0.0,
            optim="sgd",
            **changes,
        ).train()
    norm = torch.stack([gradient.norm() for gradient in gradients[4]]).norm()
    for size in (2, 1):
        off = torch.stack([(a - b).norm() for a, b in zip(gradients[4], gradients[size], strict=True)]).norm()
        assert off / norm < 1e-5


def test_images_are_float_in_the_hooks(make_trainer: Callable[..., Any]) -> None:
    seen = []

    class Spy(SRReFLTrainer):
        def rollout(self, batch: dict[str, Any]) -> dict[str, Any]:
            seen.append((batch["lr_image"].clone(), batch["hr_image"].clone(), torch.is_grad_enabled()))
            return super().rollout(batch)

    make_trainer(Spy, max_steps=1).train()
    lr_image, hr_image, grad = seen[0]
    assert lr_image.dtype == hr_image.dtype == torch.float32
    assert lr_image.shape == (2, 3, 8, 8)
    assert hr_image.shape == (2, 3, 32, 32)
    assert 0.2 < float(hr_image.mean()) < 0.8
    assert float(hr_image.max()) <= 1
    assert grad is False


# Numbers that are not finite


def weights(trainer: AlignmentTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def nothing_changed(trainer: AlignmentTrainer, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_before_the_step(make_trainer: Callable[..., Any]) -> None:
    class Breaking(SRReFLTrainer):
        moments: Any = None
        start: Any = None

        def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
            output = super().objective(model, batch)
            if self.state.global_step == 2:
                self.start = weights(self)
                self.moments = [
                    {name: tensor.clone() for name, tensor in state.items()}
                    for state in self.optimizer.state_dict()["state"].values()
                ]
                self.broken = list(batch["sample_id"])
                output.loss = output.loss * math.nan
            return output

    trainer = make_trainer(Breaking, max_steps=4)
    with pytest.raises(TrainingError, match="step 3") as caught:
        trainer.train()
    assert all(sample_id in str(caught.value) for sample_id in trainer.broken)
    assert nothing_changed(trainer, trainer.start)
    now = trainer.optimizer.state_dict()["state"].values()
    for before, after in zip(trainer.moments, now, strict=True):
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_gradient_that_is_not_finite_stops_before_the_step(make_trainer: Callable[..., Any]) -> None:
    class Breaking(SRReFLTrainer):
        def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
            output = super().objective(model, batch)
            # The square root of zero: a finite loss with an infinite gradient.
            output.loss = output.loss + (output.loss - output.loss.detach()).abs().sqrt()
            return output

    trainer = make_trainer(Breaking)
    start = weights(trainer)
    with pytest.raises(TrainingError, match=r"gradient is not finite.*photo"):
        trainer.train()
    assert nothing_changed(trainer, start)


def test_an_infinite_reward_is_refused(make_trainer: Callable[..., Any]) -> None:
    def infinite(*, completions: Tensor, **columns: Any) -> Tensor:
        return completions.mean(dim=(1, 2, 3)) * math.inf

    trainer = make_trainer(rewards=infinite)
    start = weights(trainer)
    with pytest.raises(RewardError, match="infinite"):
        trainer.train()
    assert nothing_changed(trainer, start)


# Evaluation


def outside(*, completions: Tensor, **columns: Any) -> list[float]:
    return [-float(image.mean()) for image in completions]


def test_evaluation_is_the_deployed_path_on_whole_images(make_trainer: Callable[..., Any], pairs: Any) -> None:
    trainer = make_trainer(heldout_rewards=[outside], eval_dataset=pairs(3))
    metrics = trainer.evaluate()
    rows = [pairs(3)[index] for index in range(3)]
    images = [trainer.generator.generate(row["lr_image"][None] / 255)[0] for row in rows]
    expected = sum(float(image.mean()) for image in images) / 3
    assert metrics["eval_reward"] == metrics["eval_rewards/brightness"] == pytest.approx(10 * expected, abs=1e-4)
    assert metrics["eval_heldout/outside"] == pytest.approx(-expected, abs=1e-5)
    errors = [float((image - row["hr_image"] / 255).square().mean()) for image, row in zip(images, rows, strict=True)]
    psnr = sum(-10 * math.log10(error) for error in errors) / 3
    assert metrics["eval_hr_psnr"] == pytest.approx(psnr, abs=1e-3)
    assert {"eval_lr_psnr", "eval_ssim"} <= metrics.keys()


def test_images_of_different_sizes_are_evaluated(make_trainer: Callable[..., Any], pairs: Any) -> None:
    small, large = pairs(2)[0], pairs(2)[1]
    large = {**large, "lr_image": large["lr_image"].repeat(1, 2, 1), "hr_image": large["hr_image"].repeat(1, 2, 1)}
    assert make_trainer(eval_dataset=[small, large]).evaluate()["eval_reward"] > 0


def test_lr_images_alone_are_enough(make_trainer: Callable[..., Any], pairs: Any) -> None:
    rows = [{name: value for name, value in pairs(4)[i].items() if name != "hr_image"} for i in range(4)]
    trainer = make_trainer(train_dataset=rows, eval_dataset=rows)
    trainer.train()
    metrics = trainer.evaluate()
    assert "eval_lr_psnr" in metrics
    assert "eval_hr_psnr" not in metrics


def test_the_best_checkpoint_is_kept_and_loaded(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        # The darkest is best, so that the reward that is climbed makes every later one worse.
        metric_for_best_model="eval_reward",
        greater_is_better=False,
        eval_on_start=True,
        ema_decay=0.5,
    )
    trainer.train()
    run = Path(trainer.args.output_dir)
    assert trainer.state.best_global_step == 1
    assert trainer.state.best_model_checkpoint == str(run / "checkpoint-1")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-5", "checkpoint-6"]
    history = [line for line in trainer.state.log_history if "eval_reward" in line]
    assert trainer.evaluate()["eval_reward"] == pytest.approx(history[1]["eval_reward"], abs=1e-6)
    saved = load_generator(run / "generator")
    rewards = [10 * saved.generate(trainer.eval_dataset[i]["lr_image"][None] / 255).mean() for i in range(3)]
    assert sum(map(float, rewards)) / 3 == pytest.approx(history[1]["eval_reward"], abs=1e-4)
    assert trainer.summary()["reward_after"] == history[1]["eval_reward"]


def test_summary_says_before_and_after(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(
        max_steps=3, eval_strategy="steps", eval_steps=100, eval_on_start=True, heldout_rewards=[outside]
    )
    trainer.train()
    summary = trainer.summary()
    assert summary["steps"] == 3
    assert summary["images"] == 6
    assert summary["reward_after"] > summary["reward_before"]
    assert summary["heldout_before"].keys() == summary["heldout_after"].keys() == {"outside"}
    assert summary["seconds"] > 0
    assert summary["seed"] == 42
    assert {"torch", "transformers"} <= summary["versions"].keys()


def test_image_grids_are_written(make_trainer: Callable[..., Any]) -> None:
    from PIL import Image

    trainer = make_trainer(max_steps=2, log_image_steps=2, num_log_images=2)
    trainer.train()
    grids = sorted((Path(trainer.args.output_dir) / "images").iterdir())
    assert [grid.name for grid in grids] == ["step-2.png"]
    # LR | before | now | HR, 32 px each, two rows, with gaps.
    assert Image.open(grids[0]).size == (4 * 36, 2 * 36)


def test_the_alarm_stops_a_run(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(
        max_steps=20,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        hacking_patience=2,
        heldout_rewards=[outside],
    )
    trainer.train()
    assert trainer.state.global_step == 2


# Rewards and data


def test_rewards_by_name_and_entry(make_trainer: Callable[..., Any], reward: Any) -> None:
    trainer = make_trainer(rewards=[reward, {"name": "psnr", "weight": 0.5}, "lr_consistency"], max_steps=1)
    assert trainer.reward_names == ["brightness", "psnr", "lr_consistency"]
    assert trainer.reward_weights == [1.0, 0.5, 1.0]
    trainer.train()


def test_a_wrong_number_of_weights_is_refused(make_generator: Any, reward: Any) -> None:
    with pytest.raises(ConfigError, match="2 weights for 1"):
        SRReFLTrainer(make_generator(), reward, args=SRReFLConfig(use_cpu=True), reward_weights=[1.0, 2.0])


def test_training_images_of_different_sizes_are_refused(make_trainer: Callable[..., Any], pairs: Any) -> None:
    rows = [pairs(2)[0], {**pairs(2)[1], "lr_image": pairs(2)[1]["lr_image"][:, :4]}]
    with pytest.raises(DataError, match="crop_size"):
        make_trainer(train_dataset=rows).train()


def test_an_endless_dataset_is_refused(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="no length"):
        make_trainer(train_dataset=iter([1])).train()


def test_a_plain_network_trains(settings: Any, pairs: Any, reward: Any) -> None:
    from refreward_trl.generators.module import ModuleGenerator

    network = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.PixelShuffle(4))
    args = SRReFLConfig(**settings(max_steps=3))
    trainer = SRReFLTrainer(ModuleGenerator(network), reward, args=args, train_dataset=pairs(4))
    trainer.train()
    assert trainer.state.log_history[-2]["anchor"] > 0


def test_activation_checkpointing_gives_the_same_weights(make_trainer: Callable[..., Any]) -> None:
    ends = []
    for checkpointed in (False, True):
        trainer = make_trainer(activation_checkpointing=checkpointed, max_steps=2)
        trainer.train()
        ends.append(weights(trainer))
    assert trainer.model.is_gradient_checkpointing
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_of_a_plain_network_is_refused(settings: Any, reward: Any) -> None:
    from refreward_trl.generators.module import ModuleGenerator

    args = SRReFLConfig(**settings(activation_checkpointing=True))
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        SRReFLTrainer(ModuleGenerator(nn.Conv2d(3, 3, 1), scale=1), reward, args=args)


def test_several_processes_without_a_wrapper_are_refused(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(SetupError, match="not wrapped"):
        trainer.compute_loss(trainer.model, {})


def test_the_global_random_state_is_not_touched(make_trainer: Callable[..., Any]) -> None:
    """Neither by rollout, order and loaders nor by evaluation; the adapter's start is drawn in a fork."""
    trainer = make_trainer(
        SRDDPOTrainer, config=SRDDPOConfig, num_generations=4, max_steps=2, eval_strategy="steps", eval_steps=1
    )
    before = torch.get_rng_state()
    trainer.train()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_adapter_starts_the_same_whatever_ran_before(make_trainer: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    first = weights(make_trainer())
    torch.manual_seed(2)
    torch.rand(5)
    assert nothing_changed(make_trainer(), first)


def test_eval_mode_comes_back() -> None:
    module = nn.Dropout()
    with pytest.raises(RuntimeError), eval_mode(module):
        assert not module.training
        raise RuntimeError
    assert module.training


# Settings


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"anchor": "refrence"}, "anchor"),
        ({"anchor_weight": -1.0}, "anchor_weight"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"reward_weight": -0.5}, "reward_weight"),
    ],
)
def test_wrong_settings_are_refused_by_key(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SRReFLConfig(use_cpu=True, **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_generations": 1}, "num_generations"),
        ({"num_generations": 5}, "antithetic"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"noise": "sde"}, "noise"),
        ({"log_prob_reduction": "max"}, "log_prob_reduction"),
    ],
)
def test_wrong_ddpo_settings_are_refused_by_key(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SRDDPOConfig(use_cpu=True, **changes)


def test_at_least_two_checkpoints_are_kept() -> None:
    assert SRReFLConfig(use_cpu=True, save_total_limit=1).save_total_limit == 2


# Rewards that fail


class FailsSometimes:
    """A server that is gone at some calls."""

    __name__ = "server"

    def __init__(self, failing: set[int]) -> None:
        self.failing, self.calls = failing, 0

    def __call__(self, *, completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls in self.failing:
            raise ConnectionError("gone")
        return 10 * completions.mean(dim=(1, 2, 3))


def test_a_failing_reward_stops_the_run_by_default(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(RewardError, match=r"server.*gone"):
        make_trainer(rewards=FailsSometimes({2}), max_steps=4).train()


def test_dropped_calls_change_no_weight_and_are_counted(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(
        rewards=FailsSometimes({2, 3}), max_steps=4, on_bad_reward="drop", anchor="none", self_check=False
    )
    trainer.train()
    failed = [line["rewards/server/failed"] for line in trainer.state.log_history if "rewards/server/failed" in line]
    assert failed == [0.0, 2.0, 2.0, 0.0]
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.generator_parameters())


def test_dropping_has_an_end(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(
        rewards=FailsSometimes(set(range(2, 100))),
        max_steps=40,
        on_bad_reward="drop",
        max_failed_rewards=2,
        self_check=False,
    )
    with pytest.raises(RewardError, match="3 calls failed in the last 50 updates"):
        trainer.train()
    assert trainer.state.global_step == 3

"""DDPO climbs a black box, reuses its rollouts, and refuses what could not learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from refreward_trl.errors import ConfigError, RewardError, TrainingError
from refreward_trl.trainers.ddpo_config import SRDDPOConfig
from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer


@pytest.fixture
def make_trainer(
    make_generator: Any, black_box: Any, pairs: Any, lora: Any, settings: Any
) -> Callable[..., SRDDPOTrainer]:
    def make(
        rewards: Any = black_box, kind: type[SRDDPOTrainer] = SRDDPOTrainer, peft: dict | None = None, **changes: Any
    ) -> SRDDPOTrainer:
        return kind(
            make_generator(),
            rewards,
            args=SRDDPOConfig(**settings(**{"num_generations": 4, **changes})),
            train_dataset=pairs(8),
            eval_dataset=pairs(3),
            peft_config=lora(**(peft or {})),
        )

    return make


@pytest.mark.parametrize(
    ("policy", "least_gain"),
    [
        ({"noise": "white"}, 0.01),
        ({"noise": "lowfreq"}, 0.01),
        # An untrained generator adds little, so that moves along it change little.
        ({"noise": "residual", "noise_cell": 2, "log_prob_reduction": "sum"}, 0.005),
    ],
    ids=["white", "lowfreq", "residual"],
)
def test_learns_more_than_shuffled_advantages(
    make_trainer: Callable[..., SRDDPOTrainer], policy: dict, least_gain: float
) -> None:
    changes = {
        **policy,
        "max_steps": 12,
        "num_generations": 8,
        "per_device_train_batch_size": 4,
        "anchor_weight": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 12,
        "eval_on_start": True,
    }
    gains = {}
    for shuffled in (False, True):
        trainer = make_trainer(shuffle_advantages=shuffled, **changes)
        trainer.train()
        summary = trainer.summary()
        gains[shuffled] = summary["reward_after"] - summary["reward_before"]
    assert gains[False] > least_gain
    assert gains[False] > 2 * abs(gains[True])


def test_residual_noise_needs_a_generator_that_adds_something(make_trainer: Callable[..., SRDDPOTrainer]) -> None:
    trainer = make_trainer(noise="residual", max_steps=1)
    predict = trainer.generator.predict
    trainer.generator.predict = lambda z, *rest, **options: z + 0 * predict(z, *rest, **options)
    with pytest.raises(ConfigError, match="adds next to nothing"):
        trainer.train()


def test_logs_under_trl_names(make_trainer: Callable[..., SRDDPOTrainer], read_metrics: Any) -> None:
    trainer = make_trainer(num_iterations=2, max_steps=4, beta=0.01)
    trainer.train()
    lines = read_metrics(trainer.args.output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = {"reward", "reward_std", "frac_reward_zero_std", "rewards/black_box_brightness/mean"}
    names |= {"rewards/black_box_brightness/std", "rewards/black_box_brightness/missing"}
    updates = {"loss", "policy/ratio", "policy/clip_fraction", "kl", "anchor", "grad_norm"}
    assert names | updates <= lines[0].keys()
    # The second update of a rollout draws and rewards nothing.
    assert updates <= lines[1].keys()
    assert not names & lines[1].keys()
    assert lines[0]["policy/ratio"] == lines[2]["policy/ratio"] == 1
    assert lines[1]["policy/ratio"] != 1


def test_images_are_read_once_per_rollout(make_trainer: Callable[..., SRDDPOTrainer]) -> None:
    trainer = make_trainer(num_iterations=3, max_steps=6, gradient_accumulation_steps=2)
    trainer.train()
    # Two rollouts of 2 x 2 images, each for three updates.
    assert len(trainer.train_dataset.read) == 8


@pytest.mark.parametrize(
    ("noise", "rounding"),
    # Residual noise brings a direction to unit size, and its rounding errors with it.
    [("lowfreq", 1e-6), ("residual", 2e-5)],
)
def test_candidates_do_not_depend_on_the_batch(
    make_trainer: Callable[..., SRDDPOTrainer], noise: str, rounding: float
) -> None:
    drawn: list[dict[str, Tensor]] = []
    for size in (1, 4):
        candidates = {}

        class Spy(SRDDPOTrainer):
            def rollout(self, batch: dict[str, Any], seen: dict[str, Tensor] = candidates) -> dict[str, Any]:
                batch = super().rollout(batch)
                groups = batch["candidates"].unflatten(0, (len(batch["sample_id"]), -1))
                seen |= dict(zip(batch["sample_id"], groups, strict=True))
                return batch

        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        make_trainer(kind=Spy, noise=noise, **changes).train()
        drawn.append(candidates)
    assert drawn[0].keys() == drawn[1].keys()
    for sample_id, group in drawn[0].items():
        torch.testing.assert_close(group, drawn[1][sample_id], rtol=0, atol=rounding)


def test_groups_are_rewarded_whole(make_trainer: Callable[..., SRDDPOTrainer], black_box: Any) -> None:
    sizes = []

    def watching(*, completions: Tensor, sample_id: list[str], hr_image: Tensor, **columns: Any) -> list[float]:
        assert len(sample_id) == len(hr_image) == len(completions)
        assert all(len(set(sample_id[start : start + 4])) == 1 for start in range(0, len(sample_id), 4))
        sizes.append(len(completions))
        return black_box(completions=completions)

    make_trainer(watching, per_device_train_batch_size=3, reward_batch_size=9, max_steps=1, self_check=False).train()
    assert sizes == [8, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage": "running"},
        {"scale_rewards": "batch"},
        {"noise": "white", "antithetic": False},
        {"log_prob_reduction": "sum"},
        {"anchor": "none"},
    ],
)
def test_variants_train(make_trainer: Callable[..., SRDDPOTrainer], changes: dict[str, Any]) -> None:
    trainer = make_trainer(max_steps=1, **changes)
    trainer.train()
    assert trainer.state.global_step == 1


def test_sigma_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="deterministic policy"):
        SRDDPOConfig(sigma=0.0, use_cpu=True)


def test_a_constant_reward_is_refused(make_trainer: Callable[..., SRDDPOTrainer]) -> None:
    with pytest.raises(RewardError, match="same reward"):
        make_trainer(lambda *, completions, **columns: [0.5] * len(completions)).train()


def test_a_reward_that_scores_nothing_is_refused(make_trainer: Callable[..., SRDDPOTrainer]) -> None:
    with pytest.raises(RewardError, match="scored"):
        make_trainer(lambda *, completions, **columns: [None] * len(completions)).train()


def test_a_reward_that_is_mostly_noise_is_refused(make_trainer: Callable[..., SRDDPOTrainer]) -> None:
    source = torch.Generator().manual_seed(0)

    def dice(*, completions: Tensor, **columns: Any) -> list[float]:
        # The same images get other numbers the second time, further apart than the candidates are.
        return (dice.level + 1e-3 * torch.rand(len(completions), generator=source)).tolist()

    dice.level = 0.0

    class Drifting(SRDDPOTrainer):
        def rollout(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch = super().rollout(batch)
            dice.level = 1.0
            return batch

    with pytest.raises(RewardError, match="twice"):
        make_trainer(dice, kind=Drifting).train()


def test_dropout_is_refused(make_trainer: Callable[..., SRDDPOTrainer]) -> None:
    class Trained(SRDDPOTrainer):
        """Moves the adapter off its start first: dropout cannot show in an adapter that adds zero."""

        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            with torch.no_grad():
                for parameter in self.generator_parameters():
                    parameter.add_(0.05)

    make_trainer(kind=Trained, max_steps=1).train()
    with pytest.raises(TrainingError, match="ratio"):
        make_trainer(kind=Trained, max_steps=1, peft={"lora_dropout": 0.5}).train()


def test_one_moved_weight_is_noticed(make_trainer: Callable[..., SRDDPOTrainer]) -> None:
    class Disturbed(SRDDPOTrainer):
        def rollout(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch = super().rollout(batch)
            with torch.no_grad():
                self.generator.denoiser.get_parameter("conv_out.base_layer.bias")[0] += 1e-3
            return batch

    with pytest.raises(TrainingError, match="ratio"):
        make_trainer(kind=Disturbed).train()


def test_a_zero_gradient_is_noticed(make_trainer: Callable[..., SRDDPOTrainer]) -> None:
    class Mute(SRDDPOTrainer):
        def objective(self, model: Any, batch: dict[str, Any]) -> Any:
            output = super().objective(model, batch)
            output.loss = 0 * output.loss
            return output

    with pytest.raises(TrainingError, match="gradient"):
        make_trainer(kind=Mute).train()


def test_a_plain_network_is_refused(settings: Any, pairs: Any, black_box: Any) -> None:
    from refreward_trl.generators.module import ModuleGenerator

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 48, 3, padding=1), torch.nn.PixelShuffle(4))
    args = SRDDPOConfig(**settings(anchor="none"))
    trainer = SRDDPOTrainer(ModuleGenerator(network), black_box, args=args, train_dataset=pairs(4))
    with pytest.raises(ConfigError, match="refl"):
        trainer.train()

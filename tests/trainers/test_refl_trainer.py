"""ReFL climbs a reward that has a gradient, and says so when it has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refreward_trl.errors import ConfigError, RewardError
from refreward_trl.generators.module import ModuleGenerator
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer


@pytest.fixture
def make_trainer(
    make_generator: Any, reward: Any, pairs: Any, lora: Any, settings: Any
) -> Callable[..., SRReFLTrainer]:
    def make(rewards: Any = reward, **changes: Any) -> SRReFLTrainer:
        return SRReFLTrainer(
            make_generator(),
            rewards,
            args=SRReFLConfig(**settings(**changes)),
            train_dataset=pairs(8),
            eval_dataset=pairs(3),
            peft_config=lora(),
        )

    return make


def test_learns_more_than_the_control(make_trainer: Callable[..., SRReFLTrainer]) -> None:
    changes = {
        "max_steps": 12,
        "eval_strategy": "steps",
        "eval_steps": 12,
        "eval_on_start": True,
        "anchor_weight": 0.5,
    }
    gains = {}
    for weight in (1.0, 0.0):
        trainer = make_trainer(reward_weight=weight, **changes)
        trainer.train()
        summary = trainer.summary()
        gains[weight] = summary["reward_after"] - summary["reward_before"]
    assert gains[1.0] > 0.02
    # Held to its own start, the control does not move at all.
    assert gains[0.0] == 0


def test_an_anchor_holds_back(make_trainer: Callable[..., SRReFLTrainer]) -> None:
    moved = {}
    for weight in (0.0, 20.0):
        trainer = make_trainer(anchor_weight=weight, max_steps=6)
        lr_image = trainer.train_dataset[0]["lr_image"][None] / 255
        before = trainer.generator.generate(lr_image)
        trainer.train()
        moved[weight] = float((trainer.generator.generate(lr_image) - before).abs().mean())
    assert moved[20.0] < 0.5 * moved[0.0]


def test_latents_of_images_that_come_again_are_kept(
    make_trainer: Callable[..., SRReFLTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, encoded = {}, {}
    for cache in (0, 1):
        trainer = make_trainer(
            max_steps=12, learning_rate=1e-3, eval_strategy="no", eval_on_start=False, cache_lr_latents=cache
        )
        sizes: list[int] = []
        encode = trainer.generator.encode_image
        count = lambda image, encode=encode, sizes=sizes: (sizes.append(len(image)), encode(image))[1]  # noqa: E731
        monkeypatch.setattr(trainer.generator, "encode_image", count)
        trainer.train()
        weights[cache], encoded[cache] = trainer.model.state_dict(), sum(sizes)
    assert encoded[0] >= 24 and encoded[1] == 8, "12 steps of 2 images, of which there are 8"
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-4)


def test_a_generator_without_a_vae_has_no_latents_to_keep(settings: Any, reward: Any, pairs: Any) -> None:
    network = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.PixelShuffle(4))
    with pytest.raises(ConfigError, match="ModuleGenerator has no VAE"):
        SRReFLTrainer(
            ModuleGenerator(network), reward, args=SRReFLConfig(**settings(cache_lr_latents=1)), train_dataset=pairs(8)
        )


def test_a_reward_without_graph_is_refused_by_name(make_trainer: Callable[..., SRReFLTrainer], black_box: Any) -> None:
    trainer = make_trainer(black_box)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(RewardError, match=r"black_box_brightness.*not differentiable"):
        trainer.train()
    assert all(torch.equal(tensor, start[name]) for name, tensor in trainer.model.state_dict().items())


def test_weight_zero_needs_no_graph(make_trainer: Callable[..., SRReFLTrainer], reward: Any, black_box: Any) -> None:
    trainer = make_trainer([reward, black_box])
    trainer.reward_weights = [1.0, 0.0]
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_unscored_image_counts_nothing(make_trainer: Callable[..., SRReFLTrainer], read_metrics: Any) -> None:
    def half(*, completions: Tensor, **columns: Any) -> list[Any]:
        values = completions.mean(dim=(1, 2, 3))
        return [values[0], *[None] * (len(values) - 1)]

    trainer = make_trainer(half)
    trainer.train()
    first = read_metrics(trainer.args.output_dir)[0]
    assert first["rewards/half/missing"] == 1
    assert first["reward"] > 0.1


def test_no_reward_is_refused(make_trainer: Callable[..., SRReFLTrainer]) -> None:
    with pytest.raises(ConfigError, match="no reward"):
        make_trainer([]).train()


def test_hr_anchor_without_hr_images_is_refused(
    make_trainer: Callable[..., SRReFLTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(anchor="hr")
    whole = type(trainer.train_dataset).__getitem__
    monkeypatch.setattr(
        type(trainer.train_dataset),
        "__getitem__",
        lambda self, index: {name: value for name, value in whole(self, index).items() if name != "hr_image"},
    )
    with pytest.raises(ConfigError, match="no HR images"):
        trainer.train()


@pytest.mark.parametrize("anchor", ["hr", "lr_consistency", "reference_lr", "none"])
def test_other_anchors_train(make_trainer: Callable[..., SRReFLTrainer], anchor: str) -> None:
    trainer = make_trainer(anchor=anchor, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1

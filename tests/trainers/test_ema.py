"""The average follows the weights, and what is evaluated and saved is the average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from refreward_trl.errors import CheckpointError
from refreward_trl.generators import load_generator
from refreward_trl.trainers.base import AlignmentTrainer
from refreward_trl.trainers.ema import WeightAverage
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer


def test_update_is_the_recursion_and_leaves_frozen_weights_out() -> None:
    module = nn.Linear(2, 1, dtype=torch.bfloat16)
    module.bias.requires_grad_(False)
    average = WeightAverage(module, 0.9)
    start = module.weight.detach().float().clone()
    with torch.no_grad():
        module.weight += 1
    average.update()
    expected = 0.9 * start + 0.1 * module.weight.detach().float()
    assert average.state_dict().keys() == {"weight"}
    assert average.state_dict()["weight"].dtype == torch.float32
    torch.testing.assert_close(average.state_dict()["weight"], expected)


def test_own_weights_come_back_even_after_an_error() -> None:
    module = nn.Linear(2, 1)
    average = WeightAverage(module, 0.5)
    with torch.no_grad():
        module.weight.fill_(3.0)
    with pytest.raises(RuntimeError, match="inside"), average.swapped_in():
        assert float(module.weight.detach().max()) < 3
        raise RuntimeError("inside")
    assert bool((module.weight == 3).all())


def test_a_state_of_another_model_is_refused() -> None:
    average = WeightAverage(nn.Linear(2, 1), 0.5)
    with pytest.raises(CheckpointError, match="bias"):
        average.load_state_dict({"weight": torch.zeros(1, 2)}, "ema.safetensors")
    with pytest.raises(CheckpointError, match="shape"):
        average.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(1)}, "ema.safetensors")


@pytest.fixture
def trainer(make_generator: Any, reward: Any, pairs: Any, settings: Any, lora: Any) -> SRReFLTrainer:
    args = SRReFLConfig(**settings(ema_decay=0.5, max_steps=4, save_strategy="steps", save_steps=2))
    return SRReFLTrainer(
        make_generator(), reward, args=args, train_dataset=pairs(4), eval_dataset=pairs(1), peft_config=lora()
    )


def image(trainer: AlignmentTrainer) -> torch.Tensor:
    return trainer.generator.generate(trainer.train_dataset[0]["lr_image"][None] / 255)


def test_the_saved_policy_is_the_average(trainer: SRReFLTrainer) -> None:
    trainer.train()
    with trainer.averaged_weights():
        averaged = image(trainer)
    assert float((averaged - image(trainer)).abs().max()) > 1e-4
    saved = load_generator(f"{trainer.args.output_dir}/generator")
    again = saved.generate(trainer.train_dataset[0]["lr_image"][None] / 255)
    torch.testing.assert_close(again, averaged, rtol=0, atol=1e-6)


def test_evaluation_uses_the_average(trainer: SRReFLTrainer) -> None:
    trainer.train()
    with trainer.averaged_weights():
        expected = float(10 * image(trainer).mean())
    assert trainer.evaluate()["eval_reward"] == pytest.approx(expected, abs=1e-5)
    assert float(10 * image(trainer).mean()) != pytest.approx(expected, abs=1e-5)

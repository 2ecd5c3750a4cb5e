"""Supervised training: the denoiser through the frozen decoder, and the VAE before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from refreward_trl.errors import ConfigError
from refreward_trl.generators import load_generator
from refreward_trl.trainers.finetune_config import SRFinetuneConfig
from refreward_trl.trainers.finetune_trainer import SRFinetuneTrainer


@pytest.fixture
def make_trainer(make_generator: Any, pairs: Any, lora: Any, settings: Any) -> Callable[..., SRFinetuneTrainer]:
    def make(adapter: bool = False, distance: Any = None, **changes: Any) -> SRFinetuneTrainer:
        return SRFinetuneTrainer(
            make_generator(),
            args=SRFinetuneConfig(**settings(**changes)),
            train_dataset=pairs(8),
            eval_dataset=pairs(2),
            peft_config=lora() if adapter else None,
            perceptual=distance,
        )

    return make


@pytest.mark.parametrize("pixel_loss", ["l1", "log_mse"])
def test_the_denoiser_learns_and_the_vae_stays(
    make_trainer: Callable[..., SRFinetuneTrainer], pixel_loss: str
) -> None:
    trainer = make_trainer(
        pixel_loss=pixel_loss,
        max_steps=15,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=15,
        eval_on_start=True,
    )
    vae = {name: tensor.clone() for name, tensor in trainer.generator.vae.state_dict().items()}
    trainer.train()
    summary = trainer.summary()
    assert summary["hr_psnr_after"] > summary["hr_psnr_before"]
    assert all(torch.equal(tensor, vae[name]) for name, tensor in trainer.generator.vae.state_dict().items())


def test_every_term_of_the_loss_is_logged(make_trainer: Callable[..., SRFinetuneTrainer], read_metrics: Any) -> None:
    def distance(sr_image: Tensor, hr_image: Tensor) -> Tensor:
        return (sr_image - hr_image).square().mean(dim=(1, 2, 3))

    weights = {"latent_weight": 0.5, "gradient_weight": 0.2, "perceptual_weight": 3.0, "pixel_loss": "mse"}
    trainer = make_trainer(adapter=True, distance=distance, max_steps=1, **weights)
    trainer.train()
    line = read_metrics(trainer.args.output_dir)[0]
    assert line["perceptual_loss"] == pytest.approx(line["pixel_loss"], rel=1e-5)
    total = line["pixel_loss"] + 0.5 * line["latent_loss"] + 0.2 * line["gradient_loss"] + 3 * line["perceptual_loss"]
    assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_the_vae_learns_and_the_denoiser_stays(make_trainer: Callable[..., SRFinetuneTrainer]) -> None:
    trainer = make_trainer(
        train_part="vae", max_steps=15, learning_rate=3e-3, eval_strategy="steps", eval_steps=15, eval_on_start=True
    )
    denoiser = {name: tensor.clone() for name, tensor in trainer.generator.denoiser.state_dict().items()}
    encoder = trainer.generator.vae.encoder.layers[0].weight.clone()
    trainer.train()
    psnr = [line["eval_vae_psnr"] for line in trainer.state.log_history if "eval_vae_psnr" in line]
    assert psnr[-1] > psnr[0] + 0.5
    assert not torch.equal(trainer.generator.vae.encoder.layers[0].weight, encoder)
    now = trainer.generator.denoiser.state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in denoiser.items())


def test_the_saved_vae_is_calibrated_and_averaged(make_trainer: Callable[..., SRFinetuneTrainer]) -> None:
    trainer = make_trainer(train_part="vae", max_steps=3, save_strategy="steps", save_steps=3, ema_decay=0.9)
    trainer.train()
    saved: Any = load_generator(f"{trainer.args.output_dir}/generator")
    hr_images = torch.stack([trainer.train_dataset[index]["hr_image"] for index in range(8)]) / 255
    latents = saved.encode_image(hr_images)
    assert float(latents.std()) == pytest.approx(1, abs=0.01)
    assert float(latents.mean()) == pytest.approx(0, abs=0.01)
    with trainer.averaged_weights():
        averaged = {name: tensor.clone() for name, tensor in trainer.generator.vae.state_dict().items()}
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in saved.vae.state_dict().items())


def test_jitter_is_noise_on_latents(make_trainer: Callable[..., SRFinetuneTrainer]) -> None:
    trainer = make_trainer(train_part="vae", latent_jitter=0.1)
    batch = trainer.rollout(trainer._images_to_float(trainer.data_collator([trainer.train_dataset[0]])))
    assert batch["images"].shape == (2, 3, 32, 32)
    with torch.no_grad():
        raw = trainer.generator.encode_image(batch["images"]) / trainer.generator.config.latent_scale
    ratio = batch["jitter"].std(dim=(0, 2, 3)) / raw.std(dim=(0, 2, 3))
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.1), rtol=0.15, atol=0)
    same = trainer.rollout(trainer._images_to_float(trainer.data_collator([trainer.train_dataset[0]])))
    assert torch.equal(batch["jitter"], same["jitter"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train_part": "vae", "latent_weight": 1.0}, "latent_weight"),
        ({"pixel_weight": 0.0}, "every weight"),
        ({"train_part": "decoder"}, "train_part"),
        ({"perceptual": "no.such.thing"}, "perceptual"),
    ],
)
def test_wrong_settings_are_refused(
    make_trainer: Callable[..., SRFinetuneTrainer], changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        make_trainer(**changes)


def test_lora_on_the_vae_is_refused(make_trainer: Callable[..., SRFinetuneTrainer]) -> None:
    with pytest.raises(ConfigError, match="LoRA"):
        make_trainer(adapter=True, train_part="vae")

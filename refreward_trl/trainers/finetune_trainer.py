"""Supervised training of a one-step generator: first its VAE, then its denoiser through the frozen decoder."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from refreward_trl.errors import ConfigError
from refreward_trl.generators.base import Generator
from refreward_trl.generators.epsilon import EpsLatentGenerator
from refreward_trl.objectives.reconstruction import PIXEL_LOSSES, gradient_loss
from refreward_trl.randomness import stateless_generator
from refreward_trl.rewards.fidelity import image_psnr
from refreward_trl.trainers.alignment_config import AlignmentConfig
from refreward_trl.trainers.base import AlignmentTrainer
from refreward_trl.trainers.finetune_config import SRFinetuneConfig
from refreward_trl.types import LossOutput, Metrics

if TYPE_CHECKING:
    from peft import LoraConfig

CALIBRATION_IMAGES = 32


class SRFinetuneTrainer(AlignmentTrainer):
    """Trains a generator on LR/HR pairs.

    `train_part` "denoiser": the prediction is decoded by the frozen VAE and compared with the HR image. "vae": the
    autoencoder learns to reproduce HR images and enlarged LR images, with noise on the latents so that the decoder is
    smooth around them; afterwards the latent scale of the generator is measured anew.

    Args:
        model: As in `AlignmentTrainer`.
        args: The configuration.
        train_dataset: With the columns `sample_id`, `lr_image` and `hr_image`.
        eval_dataset: The same, whole images.
        peft_config: Only for `train_part` "denoiser".
        perceptual: A callable `(sr_image, hr_image) -> distance tensor`, instead of the dotted path in the
        configuration.
        **keywords: The remaining keywords of `AlignmentTrainer`.
    """

    config_class = SRFinetuneConfig
    args: SRFinetuneConfig

    def __init__(
        self,
        model: Generator | str,
        args: SRFinetuneConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: LoraConfig | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        **keywords: Any,
    ) -> None:
        args = SRFinetuneConfig() if args is None else args
        self.perceptual = _load_perceptual(args.perceptual) if perceptual is None and args.perceptual else perceptual
        super().__init__(
            model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            **keywords,
        )

    def rollout(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.args.train_part == "vae":
            return self._with_jitter(batch)
        cond = self.condition(batch)
        batch["encoded"] = self.generator.encode(cond)
        if self.args.latent_weight:
            batch["hr_latent"] = self._latent_generator().encode_image(batch["hr_image"])
        self.add_reference(batch, batch["encoded"], cond)
        return batch

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        if self.args.train_part == "vae":
            decoded = model(batch["images"], batch["jitter"])
            return self._image_loss(decoded, batch["images"])
        cond = self.condition(batch)
        mean = self.generator.predict(batch["encoded"], cond, model=model)
        image = self.generator.postprocess(self.generator.decode(mean, cond), cond)
        output = self._image_loss(image, batch["hr_image"])
        if self.args.latent_weight:
            distance = F.mse_loss(mean, batch["hr_latent"])
            output.metrics["latent_loss"] = distance.detach()
            output.loss = output.loss + self.args.latent_weight * distance
        output.loss = output.loss + self.anchor(image, batch)
        return output

    def evaluate_batch(self, model: nn.Module, batch: dict[str, Any]) -> Metrics:
        if self.args.train_part == "denoiser":
            return super().evaluate_batch(model, batch)
        generator = self._latent_generator()
        target = _whole_tiles(batch["hr_image"], generator.size_multiple)
        image = generator.decode_latent(generator.encode_image(target))
        return {"vae_psnr": float(image_psnr(image.clamp(0, 1), target).mean())}

    def train(self, *arguments: Any, **keywords: Any) -> TrainOutput:
        """Trains as in `AlignmentTrainer`; for the VAE it then measures the scale of its latents before saving."""
        return super().train(*arguments, **keywords)

    def _image_loss(self, image: Tensor, target: Tensor) -> LossOutput:
        distance = PIXEL_LOSSES[self.args.pixel_loss](image, target)
        metrics = {"pixel_loss": distance.detach()}
        loss = self.args.pixel_weight * distance
        if self.args.gradient_weight:
            edges = gradient_loss(image, target)
            metrics["gradient_loss"] = edges.detach()
            loss = loss + self.args.gradient_weight * edges
        if self.perceptual is not None:
            perceived = self.perceptual(image, target).mean()
            metrics["perceptual_loss"] = perceived.detach()
            loss = loss + self.args.perceptual_weight * perceived
        return LossOutput(loss, dict(metrics))

    def _with_jitter(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds `images` `(2 B, 3, H, W)`, HR and enlarged LR, and the noise for their raw latents."""
        generator = self._latent_generator()
        cond = generator.prepare(batch["lr_image"])
        height, width = cond.size
        enlarged = cond.upsampled[..., :height, :width]
        images = torch.cat([batch["hr_image"], enlarged])
        raw = generator.encode_image(images) / generator.config.latent_scale
        deviation = raw.std(dim=(2, 3), keepdim=True)
        noise = [
            torch.randn(raw.shape[1:], generator=self._jitter_source(kind, sample_id))
            for kind in ("hr", "lr")
            for sample_id in batch["sample_id"]
        ]
        batch["images"] = images
        batch["jitter"] = self.args.latent_jitter * deviation * torch.stack(noise).to(raw.device)
        return batch

    def _jitter_source(self, kind: str, sample_id: str) -> torch.Generator:
        return stateless_generator(self.args.seed, "latent_jitter", self.state.global_step, sample_id, kind)

    def _network_to_train(self, args: AlignmentConfig, peft_config: LoraConfig | None) -> nn.Module:
        if not isinstance(args, SRFinetuneConfig) or args.train_part == "denoiser":
            return super()._network_to_train(args, peft_config)
        if peft_config is not None:
            raise ConfigError(
                "the VAE is trained as a whole, without LoRA", where="peft_config", fix="set use_peft to false"
            )
        generator = self._latent_generator()
        generator.denoiser.requires_grad_(False)
        return Autoencoder(generator.vae)

    def _latent_generator(self) -> EpsLatentGenerator:
        if not isinstance(self.generator, EpsLatentGenerator):
            raise ConfigError(
                f"a {type(self.generator).__name__} has no VAE",
                where="train_part" if self.args.train_part == "vae" else "latent_weight",
                fix="train its denoiser with pixel losses only",
            )
        return self.generator

    def _save_policy(self, folder: Any, weights: Any) -> None:
        if self.args.train_part == "vae":
            # The averaged weights are in place, and the VAE is never sharded: its own state is what to save.
            self._calibrate()
            weights = None
        super()._save_policy(folder, weights)

    def _calibrate(self) -> None:
        """Measures mean and deviation of the trained VAE's latents on the first training images."""
        count = min(CALIBRATION_IMAGES, len(self.train_dataset))
        rows = [self.train_dataset[index] for index in range(count)]
        images = self._images_to_float(self.data_collator(rows))["hr_image"]
        self._latent_generator().calibrate_latents(images)


class Autoencoder(nn.Module):
    """A stock VAE whose forward encodes, adds given noise to the raw latents, and decodes.

    Stock `AutoencoderTiny.forward` rounds latents to 8 bits, through which no gradient reaches the encoder.

    Args:
        vae: `AutoencoderTiny` or `AutoencoderKL`; made trainable.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae.requires_grad_(True)

    def forward(self, images: Tensor, jitter: Tensor) -> Tensor:
        """`(b, 3, H, W)` in [0, 1] and noise in the shape of the raw latents -> reconstruction, not clamped."""
        encoded = self.vae.encode(images * 2 - 1)
        raw = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
        return self.vae.decode(raw + jitter).sample / 2 + 0.5


def _whole_tiles(image: Tensor, multiple: int) -> Tensor:
    """Crops `(b, 3, H, W)` so that a VAE can take it."""
    height, width = (side - side % multiple for side in image.shape[-2:])
    return image[..., :height, :width]


def _load_perceptual(path: str) -> Callable[[Tensor, Tensor], Tensor]:
    module_name, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import {path!r}: {error}",
            where="perceptual",
            fix="write the dotted path of a callable (sr_image, hr_image) -> distance tensor, importable from here",
        ) from error
    return found() if isinstance(found, type) else found

"""Settings of `SRFinetuneTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from refreward_trl.errors import ConfigError
from refreward_trl.objectives.reconstruction import PIXEL_LOSSES
from refreward_trl.trainers.alignment_config import AlignmentConfig
from refreward_trl.trainers.run_config import check_choice, check_range


@dataclass
class SRFinetuneConfig(AlignmentConfig):
    """Configuration of supervised one-step training."""

    anchor: Literal["reference", "reference_lr", "lr_consistency", "hr", "none"] = field(
        default="none", metadata={"help": "an anchor beside the supervised loss, which is held to the HR image anyway"}
    )
    train_part: Literal["denoiser", "vae"] = field(
        default="denoiser",
        metadata={"help": "what is trained: the denoiser through the frozen decoder, or first the VAE"},
    )
    pixel_loss: Literal["l1", "mse", "log_mse"] = field(
        default="l1",
        metadata={"help": "distance of the SR to the HR pixels; log_mse climbs the PSNR of each image"},
    )
    pixel_weight: float = field(default=1.0, metadata={"help": "weight of the pixel loss"})
    latent_weight: float = field(
        default=0.0, metadata={"help": "weight of the squared distance to the HR image's latent (denoiser)"}
    )
    gradient_weight: float = field(
        default=0.0, metadata={"help": "weight of the L1 distance of image gradients, which keeps edges"}
    )
    perceptual: str | None = field(
        default=None, metadata={"help": "dotted path of a callable (sr_image, hr_image) -> distance tensor"}
    )
    perceptual_weight: float = field(
        default=1.0, metadata={"help": "weight of the perceptual distance, if there is one"}
    )
    latent_jitter: float = field(
        default=0.05,
        metadata={"help": "noise on latents while the VAE is trained, in units of their deviation: a smooth decoder"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("train_part", self.train_part, ("denoiser", "vae"))
        check_choice("pixel_loss", self.pixel_loss, tuple(PIXEL_LOSSES))
        for key in ("pixel_weight", "latent_weight", "gradient_weight", "perceptual_weight", "latent_jitter"):
            check_range(key, getattr(self, key), low=0.0)
        if not (self.pixel_weight or self.latent_weight or self.gradient_weight or self.perceptual):
            raise ConfigError("every weight of the loss is 0", where="pixel_weight", fix="give at least one a weight")
        if self.train_part == "vae" and self.latent_weight:
            raise ConfigError(
                "latent_weight compares the denoiser's latent, but the VAE is trained",
                where="latent_weight",
                fix="set it to 0 for train_part: vae",
            )

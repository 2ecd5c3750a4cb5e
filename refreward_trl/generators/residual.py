"""Latent one-step generators whose network predicts what is wrong with the LR latent: PiSA-SR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler
from jaxtyping import Float
from torch import Tensor, nn

from refreward_trl.errors import ConfigError
from refreward_trl.generators.base import Condition
from refreward_trl.generators.diffusers_folder import read_model, write_model
from refreward_trl.generators.epsilon import UNetLatentGenerator
from refreward_trl.generators.latent import LatentConfig
from refreward_trl.generators.prompts import PromptEmbeds

PIXEL_FOLDER = "pixel_unet"


@dataclass(frozen=True, kw_only=True)
class ResidualLatentConfig(LatentConfig):
    """The numbers that define a `ResidualLatentGenerator`, besides those of `LatentConfig`.

    Attributes:
        t_net: Timestep told to the network.
        pixel_strength: How much of the degradation's removal is applied; 1 as published.
        semantic_strength: How much of the added detail is applied; 1 as published. Strengths that differ need a second
            network of the same size and a second pass.

    Raises:
        ConfigError: For a value that cannot work.
    """

    t_net: int = 1
    pixel_strength: float = 1.0
    semantic_strength: float = 1.0

    minima: ClassVar[Mapping[str, float]] = {
        **LatentConfig.minima,
        "t_net": 0,
        "pixel_strength": 0.0,
        "semantic_strength": 0.0,
    }


class ResidualLatentGenerator(UNetLatentGenerator):
    """`x0 = z - (semantic_strength e + (pixel_strength - semantic_strength) e_pixel)`, in float32.

    `e` is the network's output and `e_pixel` that of its version without the semantic adapters (PiSA-SR, equation of
    the adjustable form: `pixel_strength e_pixel + semantic_strength (e - e_pixel)`), which is never trained.

    Args:
        denoiser: The network with all adapters.
        vae: Frozen VAE.
        config: The numbers.
        prompt: The fixed prompt.
        pixel_denoiser: The network without the semantic adapters; needed where the strengths differ.
        **keywords: Those of `LatentGenerator`.

    Raises:
        ConfigError: If the parts do not fit each other, or the strengths differ without a `pixel_denoiser`.
    """

    config_class = ResidualLatentConfig
    config: ResidualLatentConfig  # pyright: ignore[reportIncompatibleMethodOverride] (narrows the property)

    def __init__(
        self,
        denoiser: nn.Module,
        vae: AutoencoderTiny | AutoencoderKL,
        config: ResidualLatentConfig,
        prompt: PromptEmbeds | Tensor | None = None,
        *,
        pixel_denoiser: nn.Module | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(denoiser, vae, config, prompt, **keywords)
        if config.pixel_strength != config.semantic_strength and pixel_denoiser is None:
            raise ConfigError(
                "different strengths need the network without its semantic adapters, which this generator has not",
                where="pixel_strength, semantic_strength",
                fix="set them when you load the published checkpoint",
            )
        self.pixel_denoiser = None if pixel_denoiser is None else pixel_denoiser.requires_grad_(False).eval()

    def predict(
        self, z: Tensor, cond: Condition, noise: Tensor | None = None, *, model: nn.Module | None = None
    ) -> Float[Tensor, "b c h w"]:
        """See `Generator.predict`."""
        if noise is not None:
            raise ConfigError(
                "the generator has no input noise, so the noise passed to predict would be ignored",
                where="noise",
                fix="pass noise=None",
            )
        pixel, semantic = self.config.pixel_strength, self.config.semantic_strength
        error = semantic * self._call(self.denoiser if model is None else model, z, self.config.t_net, cond)
        if self.pixel_denoiser is not None and pixel != semantic:
            with torch.no_grad():
                error = error + (pixel - semantic) * self._call(self.pixel_denoiser, z, self.config.t_net, cond)
        return z.float() - error

    def to(self, device: torch.device | str) -> Self:
        super().to(device)
        if self.pixel_denoiser is not None:
            self.pixel_denoiser.to(device)
        return self

    def save_pretrained(self, folder: str | PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """See `LatentGenerator.save_pretrained`; the network without semantic adapters goes to `pixel_unet/`."""
        super().save_pretrained(folder, state_dict=state_dict)
        if self.pixel_denoiser is not None:
            write_model(self.pixel_denoiser, self.pixel_denoiser.state_dict(), Path(folder) / PIXEL_FOLDER)

    @classmethod
    def _further_parts(cls, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        if not (folder / PIXEL_FOLDER).is_dir():
            return {}
        return {"pixel_denoiser": read_model(cls.denoiser_class, folder / PIXEL_FOLDER, dtype)}

    def _scheduler(self) -> DDPMScheduler:
        return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

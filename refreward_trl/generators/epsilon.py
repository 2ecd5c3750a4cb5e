"""Latent one-step generators whose network predicts noise: OSEDiff, HYPIR, NAOSD and our tiny default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from refreward_trl.errors import ConfigError
from refreward_trl.generators.base import Condition, floating_dtype
from refreward_trl.generators.latent import LatentConfig, LatentGenerator, check_channels, check_prompt
from refreward_trl.generators.prompts import PromptEmbeds
from refreward_trl.randomness import stateless_generator

MAX_ERROR_GAIN = 2.0
"""By how much the closed form may multiply errors of a network that is computed in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class EpsLatentConfig(LatentConfig):
    """The numbers that define an `EpsLatentGenerator`, besides those of `LatentConfig`.

    Attributes:
        t_net: Timestep told to the network.
        t_coeff: Timestep whose noise level the closed form uses. Above about 500 the closed form multiplies rounding
            errors (14.6 at 999, 0.57 at 200 with the Stable Diffusion schedule): such networks are refused in
            bfloat16.
        t_add: Timestep of the network's input, where it differs from `t_coeff` (NAOSD: 250 and 100); None otherwise.
        input_scaling: "alpha" treats the LR latent as the signal part of a noised latent (NAOSD): a zero prediction
            then returns the LR latent, if `t_add` is None. "none" feeds it unscaled (OSEDiff, HYPIR).
        input_noise: Amount of noise added to the network's input, as a fraction of the noise level at `t_add`, or at
            `t_coeff` without one.
        beta_start: First beta of the training schedule.
        beta_end: Last beta of the training schedule.
        beta_schedule: A name `DDPMScheduler` knows.
        num_train_timesteps: Length of the training schedule.

    Raises:
        ConfigError: For a value that cannot work.
    """

    t_net: int = 200
    t_coeff: int = 200
    t_add: int | None = None
    input_scaling: Literal["alpha", "none"] = "alpha"
    input_noise: float = 0.0
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    num_train_timesteps: int = 1000

    minima: ClassVar[Mapping[str, float]] = {**LatentConfig.minima, "input_noise": 0.0, "num_train_timesteps": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("t_net", "t_coeff", "t_add"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.num_train_timesteps:
                raise ConfigError(
                    f"{name} is {value}", where=name, fix=f"use a timestep from 0 to {self.num_train_timesteps - 1}"
                )

    def scheduler(self) -> DDPMScheduler:
        """Returns the stock scheduler with this training schedule."""
        return DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule=self.beta_schedule,
            prediction_type="epsilon",
            clip_sample=False,
        )


class UNetLatentGenerator(LatentGenerator):
    """A latent generator around Stable Diffusion's U-Net."""

    denoiser_class = UNet2DConditionModel

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser under its stock type."""
        return cast(UNet2DConditionModel, self.denoiser)

    def _call(self, network: nn.Module, z: Tensor, t: int, cond: Condition) -> Tensor:
        """Returns the network's output for a latent, float32; it gets its inputs in its own dtype."""
        dtype = floating_dtype(network)
        return network(
            z.to(dtype),
            torch.full((len(z),), t, device=z.device),
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            return_dict=False,
        )[0].float()

    def _denoiser_factor(self) -> int:
        return 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    def _null_prompt(self, denoiser: Any) -> PromptEmbeds:
        return PromptEmbeds(torch.zeros(1, 1, denoiser.config["cross_attention_dim"]))

    def _check_parts(self, denoiser: Any, vae: Any, prompt: PromptEmbeds) -> None:
        check_channels(denoiser, vae)
        check_prompt(prompt.embeds, denoiser.config["cross_attention_dim"])


class EpsLatentGenerator(UNetLatentGenerator):
    """One call of a noise-predicting U-Net in the latent space of a frozen VAE.

    `z_in = a z + input_noise s n` (or `z + input_noise s n` without input scaling), `x0 = (z_in - s eps) / a`, with
    `a^2 = alpha_bar` and `s^2 = 1 - alpha_bar` at `t_coeff`, in the first equation at `t_add` if there is one; all in
    float32. The network gets its inputs in its own dtype, the VAE in its own. The constructor is that of
    `LatentGenerator`.
    """

    config_class = EpsLatentConfig
    config: EpsLatentConfig  # pyright: ignore[reportIncompatibleMethodOverride] (narrows the property)

    @property
    def takes_noise(self) -> bool:
        return self.config.input_noise > 0

    @property
    def error_gain(self) -> float:
        """By how much the closed form multiplies an error of the network's output."""
        signal, noise_level = self._levels(self.config.t_coeff)
        return noise_level / signal

    def check_dtype(self, dtype: torch.dtype) -> None:
        """See `Generator.check_dtype`."""
        if dtype is torch.bfloat16 and self.error_gain > MAX_ERROR_GAIN:
            raise ConfigError(
                f"at timestep {self.config.t_coeff} the closed form multiplies the network's rounding errors by "
                f"{self.error_gain:.1f}: bfloat16 would put an error of 0.02 to 0.2 standard deviations into the "
                "latent (measured on networks of this size), as much as a policy's own noise",
                where="bf16 or dtype",
                fix="use float32, or fp16 on a GPU; the VAE and the judge may stay in bfloat16",
            )

    def predict(
        self, z: Tensor, cond: Condition, noise: Tensor | None = None, *, model: nn.Module | None = None
    ) -> Float[Tensor, "b c h w"]:
        """See `Generator.predict`. A generator with input noise takes the deployed path's fixed noise for None."""
        network = self.denoiser if model is None else model
        signal, noise_level = self._levels(self.config.t_coeff)
        scaling, input_level = self._levels(self.config.t_coeff if self.config.t_add is None else self.config.t_add)
        if self.config.input_scaling == "none":
            scaling = 1.0
        clean = self._with_noise(z.float(), noise, input_level / scaling)
        eps = self._call(network, scaling * clean, self.config.t_net, cond)
        # (scaling * clean - s * eps) / a, with the two scalings cancelled by hand: a zero prediction returns the input
        # exactly where they are the same.
        return (scaling / signal) * clean - (noise_level / signal) * eps

    def _levels(self, t: int) -> tuple[float, float]:
        """Returns signal and noise level at a timestep."""
        alpha_bar = float(self.config.scheduler().alphas_cumprod[t])
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    def _with_noise(self, z: Tensor, noise: Tensor | None, level: float) -> Tensor:
        if self.config.input_noise == 0:
            if noise is not None:
                raise ConfigError(
                    "the generator has no input noise, so the noise passed to predict would be ignored",
                    where="input_noise",
                    fix="pass noise=None, or give the generator input_noise > 0",
                )
            return z
        if noise is None:
            generator = stateless_generator(0, "deployed_input_noise", *z.shape[1:])
            noise = torch.randn(z.shape[1:], generator=generator)
        return z + self.config.input_noise * level * noise.to(z)

    def _scheduler(self) -> DDPMScheduler:
        return self.config.scheduler()

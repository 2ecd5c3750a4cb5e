"""Latent one-step generators whose transformer predicts a velocity: TSD-SR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor, nn

from refreward_trl.errors import ConfigError
from refreward_trl.generators.base import Condition, floating_dtype
from refreward_trl.generators.latent import LatentConfig, LatentGenerator, check_channels, check_prompt
from refreward_trl.generators.prompts import PromptEmbeds


@dataclass(frozen=True, kw_only=True)
class FlowLatentConfig(LatentConfig):
    """The numbers that define a `FlowLatentGenerator`, besides those of `LatentConfig`.

    Attributes:
        t_net: Timestep told to the network: 1000 times the noise level that it takes the LR latent for.
    """

    t_net: float = 1000.0


class FlowLatentGenerator(LatentGenerator):
    """One call of Stable Diffusion 3's transformer: `x0 = z - sigma v`, `sigma = t_net / 1000`, in float32.

    The constructor is that of `LatentGenerator`; the prompt has pooled embeddings too.
    """

    config_class = FlowLatentConfig
    denoiser_class = SD3Transformer2DModel
    config: FlowLatentConfig  # pyright: ignore[reportIncompatibleMethodOverride] (narrows the property)

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
        network = self.denoiser if model is None else model
        dtype = floating_dtype(network)
        velocity = network(
            hidden_states=z.to(dtype),
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            pooled_projections=cast(Tensor, cond.pooled_embeds).to(dtype),
            timestep=torch.full((len(z),), self.config.t_net, device=z.device),
            return_dict=False,
        )[0]
        return z.float() - (self.config.t_net / 1000) * velocity.float()

    def _scheduler(self) -> Any:
        return FlowMatchEulerDiscreteScheduler()

    def _denoiser_factor(self) -> int:
        return cast(Any, self.denoiser).config["patch_size"]

    def _null_prompt(self, denoiser: Any) -> PromptEmbeds:
        config = denoiser.config
        return PromptEmbeds(
            torch.zeros(1, 1, config["joint_attention_dim"]), torch.zeros(1, config["pooled_projection_dim"])
        )

    def _check_parts(self, denoiser: Any, vae: Any, prompt: PromptEmbeds) -> None:
        check_channels(denoiser, vae)
        check_prompt(prompt.embeds, denoiser.config["joint_attention_dim"])
        wanted = (1, denoiser.config["pooled_projection_dim"])
        if prompt.pooled is None or prompt.pooled.shape != wanted:
            found = None if prompt.pooled is None else tuple(prompt.pooled.shape)
            raise ConfigError(
                f"the pooled embeddings of the prompt have the shape {found}",
                where="prompt_embeds",
                fix=f"use {wanted}, the transformer's pooled_projection_dim",
            )

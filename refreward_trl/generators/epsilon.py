"""Latent one-step generators whose network predicts noise: OSEDiff, HYPIR, NAOSD and our tiny default.

Built from stock diffusers classes. The clean latent is computed in closed form: schedulers do not support a single
step (current diffusers raises an IndexError in `DDPMScheduler.step` after `set_timesteps(1)`), and their last step
need not equal x0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args, get_type_hints

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.generators.base import (
    POLICY_ADAPTER,
    Condition,
    Generator,
    check_lr_image,
    floating_dtype,
    pad_to_multiple,
)
from refreward_trl.generators.color_fix import COLOR_FIXES
from refreward_trl.generators.diffusers_folder import read_generator_folder, write_generator_folder
from refreward_trl.generators.folders import HEADER_FILE, damaged
from refreward_trl.randomness import stateless_generator
from refreward_trl.resampling import upscale

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class EpsLatentConfig:
    """The numbers that define an `EpsLatentGenerator`.

    Attributes:
        latent_scale: Factor from centred raw VAE latents to the network's latents, about 1 / standard deviation.
        latent_shift: Subtracted from raw VAE latents before scaling.
        scale: Enlargement factor.
        t_net: Timestep told to the network.
        t_coeff: Timestep whose noise level the closed form uses. Above about 500 the closed form multiplies rounding
            errors (14.6 at 999, 0.57 at 200 with the Stable Diffusion schedule): run such networks in float32 or
            float16 autocast, not in bfloat16.
        input_scaling: "alpha" treats the LR latent as the signal part of a noised latent (HYPIR, NAOSD): a zero
            prediction then returns the LR latent. "none" feeds it unscaled (OSEDiff).
        input_noise: Amount of noise added to the network's input, as a fraction of the noise level at `t_coeff`.
        color_fix: "none", "adain" or "wavelet".
        beta_start: First beta of the training schedule.
        beta_end: Last beta of the training schedule.
        beta_schedule: A name `DDPMScheduler` knows.
        num_train_timesteps: Length of the training schedule.

    Raises:
        ConfigError: For a value that cannot work.
    """

    latent_scale: float
    latent_shift: float = 0.0
    scale: int = 4
    t_net: int = 200
    t_coeff: int = 200
    input_scaling: Literal["alpha", "none"] = "alpha"
    input_noise: float = 0.0
    color_fix: Literal["none", "adain", "wavelet"] = "none"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        hints = get_type_hints(EpsLatentConfig)
        for name in (field.name for field in fields(self) if hints[field.name] in (int, float)):
            if type(getattr(self, name)) not in (int, hints[name]):
                raise ConfigError(f"{name} is {getattr(self, name)!r}", where=name, fix=f"use {hints[name].__name__}")
        for name in ("t_net", "t_coeff"):
            if not 0 <= getattr(self, name) < self.num_train_timesteps:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}",
                    where=name,
                    fix=f"use a timestep from 0 to {self.num_train_timesteps - 1}",
                )
        for name in ("input_scaling", "color_fix", "beta_schedule"):
            known = get_args(hints[name])
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"unknown {name} {getattr(self, name)!r}", where=name, fix=f"use one of {', '.join(known)}"
                )
        for name, minimum in (("latent_scale", 1e-12), ("input_noise", 0.0), ("scale", 1)):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= minimum):
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=name, fix=f"use a finite number of at least {minimum}"
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


class EpsLatentGenerator(Generator):
    """One call of a noise-predicting U-Net in the latent space of a frozen VAE.

    `z_in = a z + input_noise s n` (or `z + input_noise s n` without input scaling), `x0 = (z_in - s eps) / a`, with
    `a^2 = alpha_bar` and `s^2 = 1 - alpha_bar` at `t_coeff`, in float32. The network gets its inputs in its own dtype,
    the VAE in its own.

    Args:
        unet: The denoiser. Its latent channels must be the VAE's. It is left trainable; `add_policy_adapter` freezes
            it.
        vae: `AutoencoderTiny` or `AutoencoderKL`; frozen, in eval mode.
        config: The numbers; see `EpsLatentConfig`.
        prompt_embeds: The null prompt, `(1, tokens, dim)`; one zero token by default.

    Raises:
        ConfigError: If the parts do not fit each other.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderTiny | AutoencoderKL,
        config: EpsLatentConfig,
        prompt_embeds: Float[Tensor, "1 tokens dim"] | None = None,
    ) -> None:
        if prompt_embeds is None:
            prompt_embeds = torch.zeros(1, 1, unet.config["cross_attention_dim"])
        _check_parts(unet, vae, prompt_embeds)
        self.denoiser = unet
        # Any: the two stock classes declare their inputs and outputs differently.
        self.vae: Any = vae.requires_grad_(False).eval()
        self.config = config
        self.prompt_embeds = prompt_embeds.detach().float().to(self.device)

    @property
    def config(self) -> EpsLatentConfig:
        """The numbers of the generator. Assign a new config to change them; every derived number follows."""
        return self._config

    @config.setter
    def config(self, config: EpsLatentConfig) -> None:
        self._config = config
        self.scale = config.scale
        alpha_bar = float(config.scheduler().alphas_cumprod[config.t_coeff])
        self._signal, self._noise_level = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser under its stock type."""
        return cast(UNet2DConditionModel, self.denoiser)

    @property
    def size_multiple(self) -> int:
        """Pixels to a multiple of which an enlarged image is padded: the VAE's factor times the U-Net's."""
        return _vae_factor(self.vae) * 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    @torch.no_grad()
    def prepare(self, lr_image: Float[Tensor, "b 3 h w"]) -> Condition:
        check_lr_image(lr_image)
        lr_image = lr_image.to(self.device, torch.float32)
        upsampled = upscale(lr_image, self.scale)
        return Condition(
            lr_image=lr_image,
            upsampled=pad_to_multiple(upsampled, self.size_multiple),
            size=(upsampled.shape[-2], upsampled.shape[-1]),
            prompt_embeds=self.prompt_embeds.expand(len(lr_image), -1, -1),
        )

    @torch.no_grad()
    def encode(self, cond: Condition) -> Float[Tensor, "b c h w"]:
        # Outside autocast: the latent may be cached and compared with one computed elsewhere.
        with torch.autocast(self.device.type, enabled=False):
            return self.encode_image(cond.upsampled)

    def encode_image(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Returns the scaled latent of an image in [0, 1], float32, with a graph where gradients are on.

        The mode of the posterior for `AutoencoderKL`, so that encoding is deterministic.
        """
        pixels = image.to(floating_dtype(self.vae)) * 2 - 1
        encoded = self.vae.encode(pixels)
        raw = encoded.latent_dist.mode() if _is_kl(self.vae) else encoded.latents
        return (raw.float() - self.config.latent_shift) * self.config.latent_scale

    def decode_latent(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Returns the image of a scaled latent, float32, neither cropped nor clamped."""
        raw = z.float() / self.config.latent_scale + self.config.latent_shift
        return self.vae.decode(raw.to(floating_dtype(self.vae))).sample.float() / 2 + 0.5

    def predict(
        self, z: Tensor, cond: Condition, noise: Tensor | None = None, *, model: nn.Module | None = None
    ) -> Float[Tensor, "b c h w"]:
        """See `Generator.predict`. A generator with input noise takes the deployed path's fixed noise for None."""
        network = self.denoiser if model is None else model
        dtype = floating_dtype(network)
        signal = self._signal if self.config.input_scaling == "alpha" else 1.0
        clean = self._with_noise(z.float(), noise, self._noise_level / signal)
        eps = network(
            (signal * clean).to(dtype),
            torch.full((len(z),), self.config.t_net, device=z.device),
            encoder_hidden_states=cond.prompt_embeds.to(dtype),
            return_dict=False,
        )[0]
        # (signal * clean - s * eps) / a, with the two scalings cancelled by hand: a zero prediction returns the input
        # exactly.
        return (signal / self._signal) * clean - (self._noise_level / self._signal) * eps.float()

    def decode(self, z: Tensor, cond: Condition, *, checkpoint: bool = False) -> Float[Tensor, "b 3 H W"]:
        if checkpoint and torch.is_grad_enabled():
            image = recompute_in_backward(self.decode_latent, z, use_reentrant=False)
        else:
            image = self.decode_latent(z)
        height, width = cond.size
        return image[..., :height, :width]

    def postprocess(self, image: Float[Tensor, "b 3 H W"], cond: Condition) -> Float[Tensor, "b 3 H W"]:
        height, width = cond.size
        return COLOR_FIXES[self.config.color_fix](image, cond.upsampled[..., :height, :width])

    @torch.no_grad()
    def calibrate_latents(self, image: Float[Tensor, "b 3 H W"]) -> None:
        """Sets latent_shift and latent_scale so that the latents of `image` have mean 0 and standard deviation 1.

        For a VAE that was just trained, before its denoiser is. `image` is in [0, 1], its sides fit the VAE.
        """
        self.config = replace(self.config, latent_shift=0.0, latent_scale=1.0)
        raw = self.encode_image(image)
        self.config = replace(
            self.config, latent_shift=float(raw.mean()), latent_scale=1 / max(float(raw.std()), 1e-6)
        )

    def merge_policy(self) -> None:
        """Fuses the LoRA policy into the base weights and removes the adapter.

        The image stays the same up to rounding; the reference is gone, and the base weights stay frozen.
        """
        if not self.has_policy_adapter:
            raise ConfigError(
                "there is no policy adapter to merge", where="merge_policy", fix="merge only after LoRA training"
            )
        self.unet.fuse_lora(adapter_names=[POLICY_ADAPTER])
        self.unet.unload_lora()

    def to(self, device: torch.device | str) -> Self:
        super().to(device)
        self.vae.to(device)
        self.prompt_embeds = self.prompt_embeds.to(device)
        return self

    def save_pretrained(self, folder: str | PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """See `Generator.save_pretrained`.

        Writes a folder that stock diffusers opens part by part: `unet/`, `vae/`, `scheduler/`, with a LoRA policy also
        `policy/pytorch_lora_weights.safetensors`, and beside them `generator_config.json` and
        `prompt_embeds.safetensors`.
        """
        write_generator_folder(
            Path(folder),
            class_name=type(self).__name__,
            numbers=asdict(self.config),
            unet=self.unet,
            unet_weights=self.denoiser.state_dict() | dict(state_dict or {}),
            vae=self.vae,
            scheduler=self.config.scheduler(),
            prompt_embeds=self.prompt_embeds,
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | PathLike[str], *, dtype: torch.dtype = torch.float32, **overrides: Any
    ) -> Self:
        """Reads what `save_pretrained` wrote, from the local folder only.

        Args:
            folder: The generator's folder.
            dtype: Of the U-Net and the VAE.
            **overrides: Fields of `EpsLatentConfig` to use instead of the saved ones.

        Raises:
            CheckpointError: If a part is missing, corrupt, of an unknown version or does not fit the others.
            ConfigError: If an override is unknown or out of range.
        """
        parts = read_generator_folder(Path(folder), class_name=cls.__name__, dtype=dtype)
        try:
            config = EpsLatentConfig(**parts.numbers)
        except ConfigError as error:
            raise damaged(Path(folder) / HEADER_FILE, error.what) from error
        except TypeError as error:
            raise damaged(Path(folder) / HEADER_FILE, str(error)) from error
        config = _replaced(config, overrides)
        try:
            generator = cls(parts.unet, parts.vae, config, parts.prompt_embeds)
        except ConfigError as error:
            raise CheckpointError(
                f"the parts of the generator do not fit each other: {error.what}", where=str(folder), fix=error.fix
            ) from error
        if generator.has_policy_adapter:
            generator._freeze_all_but_policy()
        return generator

    def _inject_adapter(self, lora_config: LoraConfig) -> None:
        try:
            self.unet.add_adapter(lora_config, adapter_name=POLICY_ADAPTER)
        except ValueError:
            # diffusers marks the model as adapted before it knows whether the adapter fits: a second try would crash.
            self.unet.unload_lora()
            raise

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


def _is_kl(vae: AutoencoderTiny | AutoencoderKL) -> bool:
    return isinstance(vae, AutoencoderKL)


def _vae_factor(vae: AutoencoderTiny | AutoencoderKL) -> int:
    if _is_kl(vae):
        return 2 ** (len(vae.config["block_out_channels"]) - 1)
    return 2 ** (len(vae.config["encoder_block_out_channels"]) - 1)


def _replaced(config: EpsLatentConfig, overrides: Mapping[str, Any]) -> EpsLatentConfig:
    known = [field.name for field in fields(config)]
    for name in overrides:
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            raise ConfigError(
                f"the generator has no setting {name!r}",
                where=name,
                fix=f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(known)}",
            )
    return replace(config, **overrides)


def _check_parts(unet: UNet2DConditionModel, vae: AutoencoderTiny | AutoencoderKL, prompt_embeds: Tensor) -> None:
    latent = vae.config["latent_channels"]
    channels = (unet.config["in_channels"], unet.config["out_channels"])
    if channels != (latent, latent):
        raise ConfigError(
            f"the U-Net maps {channels[0]} to {channels[1]} channels, latents have {latent}",
            where="unet",
            fix="use a U-Net whose in_channels and out_channels are the VAE's latent_channels",
        )
    dim = unet.config["cross_attention_dim"]
    if prompt_embeds.ndim != 3 or len(prompt_embeds) != 1 or prompt_embeds.shape[-1] != dim:
        raise ConfigError(
            f"the null prompt has the shape {tuple(prompt_embeds.shape)}",
            where="prompt_embeds",
            fix=f"use (1, tokens, {dim}), the U-Net's cross_attention_dim",
        )

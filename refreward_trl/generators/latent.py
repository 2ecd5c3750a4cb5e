"""What latent one-step generators share: a frozen VAE around the denoiser, prompts, a folder of stock parts.

Built from stock diffusers classes. A family says in `predict` what one call of its denoiser means; the clean latent is
computed in closed form, because schedulers do not support a single step (current diffusers raises an IndexError in
`DDPMScheduler.step` after `set_timesteps(1)`), and their last step need not equal x0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from jaxtyping import Float
from torch import Tensor, nn

from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.generators.base import (
    POLICY_ADAPTER,
    Condition,
    Generator,
    check_lr_image,
    floating_dtype,
    pad_to_multiple,
)
from refreward_trl.generators.base_models import base_model_of
from refreward_trl.generators.color_fix import COLOR_FIXES
from refreward_trl.generators.diffusers_folder import read_generator_folder, write_generator_folder
from refreward_trl.generators.folders import HEADER_FILE, damaged
from refreward_trl.generators.latent_cache import LatentCache
from refreward_trl.generators.prompts import PromptEmbeds, PromptEncoder
from refreward_trl.resampling import upscale

if TYPE_CHECKING:
    from peft import LoraConfig

    from refreward_trl.generators.origin import Origin


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The numbers that every latent generator has.

    Attributes:
        latent_scale: Factor from centred raw VAE latents to the network's latents, about 1 / standard deviation.
        latent_shift: Subtracted from raw VAE latents before scaling.
        scale: Enlargement factor.
        color_fix: "none", "adain" or "wavelet".

    Raises:
        ConfigError: For a value that cannot work.
    """

    latent_scale: float
    latent_shift: float = 0.0
    scale: int = 4
    color_fix: Literal["none", "adain", "wavelet"] = "none"

    minima: ClassVar[Mapping[str, float]] = {"latent_scale": 1e-12, "scale": 1}
    """The least value of those numbers that have one."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            _check_field(field.name, getattr(self, field.name), hints[field.name])
        for name, minimum in self.minima.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= minimum):
                raise ConfigError(f"{name} is {value}", where=name, fix=f"use a finite number of at least {minimum:g}")

    def replaced(self, changes: Mapping[str, Any]) -> Self:
        """Returns the config with some fields changed. Raises `ConfigError` for a field it has not."""
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                nearest = get_close_matches(name, known, n=1)
                raise ConfigError(
                    f"the generator has no setting {name!r}",
                    where=name,
                    fix=f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(known)}",
                )
        return replace(self, **changes)


class LatentGenerator(Generator):
    """One call of a denoiser in the latent space of a frozen VAE. Subclasses write `predict`.

    Args:
        denoiser: The network. It is left trainable; `add_policy_adapter` freezes it.
        vae: `AutoencoderTiny` or `AutoencoderKL`; frozen, in eval mode.
        config: The numbers of the family.
        prompt: The fixed prompt's embeddings; one zero token by default.
        origin: The published checkpoint it was made of, to export back to its format; None for others.

    Raises:
        ConfigError: If the parts do not fit each other.
    """

    config_class: ClassVar[type[LatentConfig]]
    denoiser_class: ClassVar[type[nn.Module]]

    prompt_encoder: PromptEncoder | None = None
    """What embeds prompts given by text; None where the fixed prompt is all there is."""
    latent_cache: LatentCache | None = None
    """Keeps the latents of LR images; None encodes them each time. The VAE must not change while it is there."""

    def __init__(
        self,
        denoiser: nn.Module,
        vae: AutoencoderTiny | AutoencoderKL,
        config: LatentConfig,
        prompt: PromptEmbeds | Tensor | None = None,
        *,
        origin: Origin | None = None,
    ) -> None:
        if isinstance(prompt, Tensor):
            prompt = PromptEmbeds(prompt)
        prompt = self._null_prompt(denoiser) if prompt is None else prompt
        self._check_parts(denoiser, vae, prompt)
        self.denoiser = denoiser
        # Any: the two stock classes declare their inputs and outputs differently.
        self.vae: Any = vae.requires_grad_(False).eval()
        self.config = config
        self.prompt = prompt.to(self.device)
        self.origin = origin

    @property
    def config(self) -> LatentConfig:
        """The numbers of the generator. Assign a new config to change them; every derived number follows."""
        return self._config

    @config.setter
    def config(self, config: LatentConfig) -> None:
        self._config = config
        self.scale = config.scale

    @property
    def color_fix(self) -> str:
        return self.config.color_fix

    @property
    def takes_prompts(self) -> bool:
        return self.prompt_encoder is not None

    @property
    def prompt_embeds(self) -> Float[Tensor, "1 tokens dim"]:
        """Embeddings of the fixed prompt."""
        return self.prompt.embeds

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel along a side."""
        blocks = "block_out_channels" if _is_kl(self.vae) else "encoder_block_out_channels"
        return 2 ** (len(self.vae.config[blocks]) - 1)

    @property
    def size_multiple(self) -> int:
        """Pixels to a multiple of which an enlarged image is padded: the VAE's factor times the denoiser's."""
        return self.vae_factor * self._denoiser_factor()

    @torch.no_grad()
    def prepare(self, lr_image: Float[Tensor, "b 3 h w"], prompts: Sequence[str] | None = None) -> Condition:
        check_lr_image(lr_image)
        lr_image = lr_image.to(self.device, torch.float32)
        upsampled = upscale(lr_image, self.scale)
        prompt = self.prompt if prompts is None else self._embed(prompts)
        count = len(lr_image)
        return Condition(
            lr_image=lr_image,
            upsampled=pad_to_multiple(upsampled, self.size_multiple),
            size=(upsampled.shape[-2], upsampled.shape[-1]),
            prompt_embeds=prompt.embeds.expand(count, -1, -1),
            pooled_embeds=None if prompt.pooled is None else prompt.pooled.expand(count, -1),
        )

    @torch.no_grad()
    def encode(self, cond: Condition) -> Float[Tensor, "b c h w"]:
        # Outside autocast: the latent may be cached and compared with one computed elsewhere.
        with torch.autocast(self.device.type, enabled=False):
            if self.latent_cache is not None:
                return self.latent_cache.encode(cond.upsampled, self.encode_image)
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

    def decode(self, z: Tensor, cond: Condition, *, checkpoint: bool = False) -> Float[Tensor, "b 3 H W"]:
        if checkpoint and torch.is_grad_enabled():
            with _checkpointed_blocks(self.vae):
                image = self.decode_latent(z)
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
        network: Any = self.denoiser
        network.fuse_lora(adapter_names=[POLICY_ADAPTER])
        network.unload_lora()

    def to(self, device: torch.device | str) -> Self:
        super().to(device)
        self.vae.to(device)
        self.prompt = self.prompt.to(device)
        return self

    def save_pretrained(self, folder: str | PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """See `Generator.save_pretrained`.

        Writes a folder that stock diffusers opens part by part: `unet/` (or `transformer/`), `vae/`, `scheduler/`,
        with a LoRA policy also `policy/pytorch_lora_weights.safetensors`, and beside them `generator_config.json` and
        `prompt_embeds.safetensors`; of a published checkpoint also what it was made of, in `origin.safetensors`.
        """
        write_generator_folder(
            Path(folder),
            class_name=type(self).__name__,
            numbers=asdict(self.config),
            denoiser=self.denoiser,
            denoiser_weights=self.denoiser.state_dict() | dict(state_dict or {}),
            vae=self.vae,
            scheduler=self._scheduler(),
            prompt=self.prompt,
            origin=self.origin,
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | PathLike[str], *, dtype: torch.dtype = torch.float32, **overrides: Any
    ) -> Self:
        """Reads what `save_pretrained` wrote, from the local folder only.

        Args:
            folder: The generator's folder.
            dtype: Of the denoiser and the VAE.
            **overrides: Fields of the family's config to use instead of the saved ones.

        Raises:
            CheckpointError: If a part is missing, corrupt, of an unknown version or does not fit the others.
            ConfigError: If an override is unknown or out of range, or the family cannot be computed in `dtype`.
        """
        parts = read_generator_folder(
            Path(folder), class_name=cls.__name__, denoiser_class=cls.denoiser_class, dtype=dtype
        )
        try:
            config = cls.config_class(**parts.numbers)
        except ConfigError as error:
            raise damaged(Path(folder) / HEADER_FILE, error.what) from error
        except TypeError as error:
            raise damaged(Path(folder) / HEADER_FILE, str(error)) from error
        config = config.replaced(overrides)
        try:
            further = cls._further_parts(Path(folder), dtype)
            generator = cls(parts.denoiser, parts.vae, config, parts.prompt, origin=parts.origin, **further)
        except ConfigError as error:
            raise CheckpointError(
                f"the parts of the generator do not fit each other: {error.what}", where=str(folder), fix=error.fix
            ) from error
        generator.check_dtype(dtype)
        if parts.origin is not None:
            generator.prompt_encoder = PromptEncoder(partial(base_model_of, parts.origin))
        if generator.has_policy_adapter:
            generator._freeze_all_but_policy()
        return generator

    @classmethod
    def _further_parts(cls, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """Reads what a family saves besides, as keywords of its constructor."""
        return {}

    def _inject_adapter(self, lora_config: LoraConfig) -> None:
        network: Any = self.denoiser
        try:
            network.add_adapter(lora_config, adapter_name=POLICY_ADAPTER)
        except ValueError:
            # diffusers marks the model as adapted before it knows whether the adapter fits: a second try would crash.
            network.unload_lora()
            raise

    def _embed(self, prompts: Sequence[str]) -> PromptEmbeds:
        if self.prompt_encoder is None:
            raise ConfigError(
                "the generator has no text encoder, only the embeddings of its fixed prompt",
                where="prompts",
                fix="leave the prompts out, or load it with the base model whose text encoder embeds them",
            )
        return self.prompt_encoder(prompts).to(self.device)

    @abstractmethod
    def _scheduler(self) -> Any:
        """Returns the stock scheduler with the family's training schedule, which is saved beside the denoiser."""

    @abstractmethod
    def _denoiser_factor(self) -> int:
        """Latent pixels to a multiple of which the denoiser's input is padded."""

    @abstractmethod
    def _null_prompt(self, denoiser: Any) -> PromptEmbeds:
        """Returns the embeddings to use where no prompt is given to the constructor."""

    @abstractmethod
    def _check_parts(self, denoiser: Any, vae: Any, prompt: PromptEmbeds) -> None:
        """Raises `ConfigError` if the parts do not fit each other."""


def check_channels(denoiser: Any, vae: Any) -> None:
    """Raises `ConfigError` unless the denoiser maps the VAE's latents to latents."""
    latent = vae.config["latent_channels"]
    channels = (denoiser.config["in_channels"], denoiser.config["out_channels"])
    if channels != (latent, latent):
        raise ConfigError(
            f"the denoiser maps {channels[0]} to {channels[1]} channels, latents have {latent}",
            where="denoiser",
            fix="use a denoiser whose in_channels and out_channels are the VAE's latent_channels",
        )


def check_prompt(embeds: Tensor, dim: int) -> None:
    """Raises `ConfigError` unless prompt embeddings are `(1, tokens, dim)`."""
    if embeds.ndim != 3 or len(embeds) != 1 or embeds.shape[-1] != dim:
        raise ConfigError(
            f"the prompt has the shape {tuple(embeds.shape)}",
            where="prompt_embeds",
            fix=f"use (1, tokens, {dim}), the denoiser's cross_attention_dim",
        )


@contextmanager
def _checkpointed_blocks(vae: Any) -> Iterator[None]:
    """Inside, a forward keeps the inputs of the decoder's blocks alone, which the backward pass computes again one by
    one: recomputing the decoder as a whole would hold all of its activations at once."""
    vae.enable_gradient_checkpointing()
    # The backward pass comes after this context: a block that checkpoints parts of itself as well would be computed
    # again without them, and torch before 2.13 refuses a block that saves other tensors the second time.
    for name, module in vae.decoder.named_modules():
        if name and hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    try:
        yield
    finally:
        vae.disable_gradient_checkpointing()


def _is_kl(vae: nn.Module) -> bool:
    return isinstance(vae, AutoencoderKL)


def _check_field(name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"unknown {name} {value!r}", where=name, fix=f"use one of {', '.join(get_args(hint))}")
        return
    accepted = {int: (int,), float: (int, float)}.get(hint, get_args(hint) or (hint,))
    if type(value) not in accepted:
        raise ConfigError(f"{name} is {value!r}", where=name, fix=f"use {getattr(hint, '__name__', hint)}")

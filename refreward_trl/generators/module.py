"""Any `nn.Module` LR -> SR as a generator, so that any SR network can be aligned by reward gradients."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from refreward_trl.errors import CheckpointError, ConfigError, SetupError
from refreward_trl.generators.base import POLICY_ADAPTER, Condition, Generator, check_lr_image, floating_dtype
from refreward_trl.generators.folders import (
    damaged,
    last_line,
    read_json,
    read_numbers,
    read_safetensors,
    write_header,
)
from refreward_trl.generators.policies import GaussianLatentPolicy
from refreward_trl.resampling import upscale
from refreward_trl.torch_files import DAMAGED

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
POLICY_SPACES = ("none", "pixel", "latent")
SPANDREL = "spandrel"


class ModuleGenerator(Generator):
    """A network LR -> SR; what it starts from is the LR image.

    Any such network can be aligned by ReFL. A policy gradient needs to be told where the Gaussian lies: on the pixels
    (`policy_space="pixel"`), or on a latent of the network (`policy_space="latent"`), which it must then return in the
    place of the image, and which `decoder` turns into the image.

    Args:
        module: `(b, 3, h, w)` in [0, 1] -> `(b, 3, h * scale, w * scale)`, or the latent `(b, c, h', w')`.
        scale: Enlargement factor.
        policy_space: "none", "pixel" or "latent".
        decoder: For "latent" only: latent -> `(b, 3, h * scale, w * scale)`. It is not trained.

    Raises:
        ConfigError: For a scale below 1, an unknown space, or a decoder that is missing or not asked for.
    """

    def __init__(
        self,
        module: nn.Module,
        scale: int = 4,
        *,
        policy_space: str = "none",
        decoder: nn.Module | None = None,
    ) -> None:
        if scale < 1:
            raise ConfigError(f"scale is {scale}", where="scale", fix="use a whole number of at least 1")
        if policy_space not in POLICY_SPACES:
            raise ConfigError(
                f"unknown policy_space {policy_space!r}",
                where="policy_space",
                fix=f"use one of {', '.join(POLICY_SPACES)}",
            )
        if (policy_space == "latent") != (decoder is not None):
            raise ConfigError(
                f"policy_space is {policy_space!r}, and there is {'no' if decoder is None else 'a'} decoder",
                where="decoder",
                fix='give a decoder with policy_space "latent", and with that alone',
            )
        self.denoiser = module
        self.scale = scale
        self.policy_space = policy_space
        self.decoder = None if decoder is None else decoder.requires_grad_(False).eval()

    @torch.no_grad()
    def prepare(self, lr_image: Float[Tensor, "b 3 h w"], prompts: Sequence[str] | None = None) -> Condition:
        """See `Generator.prepare`. Raises `ConfigError` for prompts, which a plain network does not take."""
        check_lr_image(lr_image)
        if prompts is not None:
            raise ConfigError(
                "a plain network takes no prompts", where="prompts", fix="leave them out, or use a latent generator"
            )
        lr_image = lr_image.to(self.device, torch.float32)
        upsampled = upscale(lr_image, self.scale)
        return Condition(
            lr_image=lr_image,
            upsampled=upsampled,
            size=(upsampled.shape[-2], upsampled.shape[-1]),
            prompt_embeds=lr_image.new_zeros(len(lr_image), 0, 0),
        )

    def encode(self, cond: Condition) -> Tensor:
        """Returns the LR image."""
        return cond.lr_image

    def predict(
        self, z: Tensor, cond: Condition, noise: Tensor | None = None, *, model: nn.Module | None = None
    ) -> Tensor:
        """Returns the network's SR image, or its latent, float32, not clamped.

        Raises:
            ConfigError: If the image has not `scale` times the size of the LR image.
        """
        network = self.denoiser if model is None else model
        prediction = network(z.to(floating_dtype(network))).float()
        if self.decoder is None:
            self._check_size(prediction, z, cond)
        return prediction

    def decode(self, z: Tensor, cond: Condition, *, checkpoint: bool = False) -> Float[Tensor, "b 3 H W"]:
        """Returns the image of a prediction: the prediction itself, if there is no decoder.

        Raises:
            ConfigError: If the image has not `scale` times the size of the LR image.
        """
        if self.decoder is None:
            return z
        latent = z.to(floating_dtype(self.decoder))
        if checkpoint and torch.is_grad_enabled():
            image = recompute_in_backward(self.decoder, latent, use_reentrant=False)
        else:
            image = self.decoder(latent)
        image = cast(Tensor, image).float()
        self._check_size(image, z, cond)
        return image

    def correction(self, mean: Tensor, z: Tensor, cond: Condition) -> Tensor:
        """See `Generator.correction`; of pixels what the network adds to bicubic, of a latent all of it."""
        return mean - cond.upsampled if self.policy_space == "pixel" else mean

    def _check_size(self, image: Tensor, z: Tensor, cond: Condition) -> None:
        if image.shape != (len(z), 3, *cond.size):
            raise ConfigError(
                f"the network returned {tuple(image.shape)} for an LR image of {tuple(cond.lr_image.shape)}",
                where="generator",
                fix=f"it must enlarge {self.scale} times; set scale to what the network does",
            )

    def policy(
        self,
        mean: Tensor,
        *,
        sigma: float,
        noise: str = "lowfreq",
        cell: int = 4,
        direction: Tensor | None = None,
    ) -> GaussianLatentPolicy:
        """See `Generator.policy`. Raises `ConfigError` if no `policy_space` was declared."""
        if self.policy_space == "none":
            raise ConfigError(
                "the network does not say where its policy lies",
                where="generator",
                fix='return ModuleGenerator(network, policy_space="pixel") from your function, or align it by reward '
                "gradients (refl)",
            )
        return super().policy(mean, sigma=sigma, noise=noise, cell=cell, direction=direction)

    def save_pretrained(self, folder: str | PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """See `Generator.save_pretrained`.

        Writes the weights and the scale, with a LoRA policy also a PEFT folder `policy/`; the code is the user's.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        weights = self.denoiser.state_dict() | dict(state_dict or {})
        base = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}
        _write_weights(base, target / WEIGHTS_FILE)
        if self.has_policy_adapter:
            _write_policy(self.denoiser, weights, target / "policy")
        write_header(target, type(self).__name__, {"scale": self.scale})

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] (weights alone are not enough here)
        cls, folder: str | PathLike[str], *, module: nn.Module, scale: int | None = None, **keywords: Any
    ) -> Self:
        """Loads saved weights into `module`, which the caller builds: a checkpoint never names code to run.

        Args:
            folder: What `save_pretrained` wrote.
            module: The network, with any weights.
            scale: Instead of the saved one.
            **keywords: Those of the constructor.

        Raises:
            CheckpointError: If a file is missing or corrupt, or does not fit `module`.
        """
        saved = read_numbers(Path(folder), cls.__name__).get("scale", 4)
        generator = cls(module, saved if scale is None else scale, **keywords)
        generator.load_weights(folder)
        return generator

    def load_weights(self, folder: str | PathLike[str]) -> None:
        """Loads what `save_pretrained` wrote into the network. Raises `CheckpointError` if it does not fit."""
        source = Path(folder)
        read_numbers(source, type(self).__name__)
        weights = read_safetensors(source / WEIGHTS_FILE)
        module = self.denoiser
        try:
            module.load_state_dict(weights)
            if (source / "policy").is_dir():
                _read_policy(module, source / "policy")
                self._freeze_all_but_policy()
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise damaged(source, f"the weights do not fit the {type(module).__name__}: {last_line(error)}") from error

    def to(self, device: torch.device | str) -> Self:
        super().to(device)
        if self.decoder is not None:
            self.decoder.to(device)
        return self

    def _inject_adapter(self, lora_config: LoraConfig) -> None:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(lora_config, self.denoiser, adapter_name=POLICY_ADAPTER)


def load_module_generator(
    source: str, *, scale: int | None = None, weights: str | PathLike[str] | None = None
) -> ModuleGenerator:
    """Makes a `ModuleGenerator` of "package.module:attribute", or of "spandrel:FILE".

    Args:
        source: An `nn.Module`, a `ModuleGenerator`, or a class or function without arguments that makes one;
            importable from the working directory too. Or the weights of a network that spandrel knows.
        scale: Enlargement factor of an `nn.Module`, 4 by default; a `ModuleGenerator` and spandrel know it.
        weights: Folder of a saved `ModuleGenerator` to load into it.

    Raises:
        ConfigError: If the name leads nowhere or to something else, or the scales differ.
        SetupError: If spandrel is not installed.
    """
    module_name, _, attribute = source.partition(":")
    if scale is None and weights is not None:
        scale = read_numbers(Path(weights), ModuleGenerator.__name__).get("scale")
    if module_name == SPANDREL:
        generator = _load_with_spandrel(Path(attribute))
    else:
        generator = _as_generator(_found(module_name, attribute, source), scale, source)
    if scale is not None and generator.scale != scale:
        raise ConfigError(
            f"the network enlarges {generator.scale} times, not {scale}", where="scale", fix=f"use {generator.scale}"
        )
    if weights is not None:
        generator.load_weights(weights)
    return generator


def _found(module_name: str, attribute: str, source: str) -> object:
    try:
        found = getattr(_import_from_here(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"cannot import it: {error}",
            where=source,
            fix="write package.module:attribute, with the package installed or in the working directory",
        ) from error
    return found if isinstance(found, (nn.Module, ModuleGenerator)) or not callable(found) else found()


def _as_generator(found: object, scale: int | None, source: str) -> ModuleGenerator:
    if isinstance(found, ModuleGenerator):
        return found
    if not isinstance(found, nn.Module):
        raise ConfigError(
            f"it is a {type(found).__name__}, not an nn.Module",
            where=source,
            fix="name an nn.Module (b, 3, h, w) -> (b, 3, h * scale, w * scale), or a function that returns one",
        )
    return ModuleGenerator(found, 4 if scale is None else scale)


def _load_with_spandrel(path: Path) -> ModuleGenerator:
    try:
        import spandrel  # pyright: ignore[reportMissingImports] (optional: it needs torchvision)
    except ImportError as error:
        raise SetupError(
            f"spandrel cannot be imported: {error}",
            where=f"{SPANDREL}:{path}",
            fix="pip install spandrel (it needs torchvision), or build the network in a function of your own",
        ) from error
    if not path.is_file():
        raise CheckpointError("the file is not there", where=str(path), fix="check the path")
    try:
        described = spandrel.ModelLoader(device="cpu").load_from_file(path)
    except (*DAMAGED, spandrel.UnsupportedModelError) as error:
        raise CheckpointError(
            f"spandrel cannot read it: {last_line(error)}", where=str(path), fix="see which networks spandrel supports"
        ) from error
    if (described.input_channels, described.output_channels) != (3, 3):
        raise ConfigError(
            f"the network maps {described.input_channels} to {described.output_channels} channels",
            where=str(path),
            fix="use a network for RGB images",
        )
    return ModuleGenerator(described.model.float(), described.scale, policy_space="pixel")


def _import_from_here(name: str) -> ModuleType:
    """Imports a module as `python -m` would: the working directory counts, even under an installed console script."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    # clone: safetensors refuses tensors that share memory, which tied weights do.
    save_file({name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}, path)


def _write_policy(module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    from peft import get_peft_model_state_dict

    folder.mkdir(exist_ok=True)
    adapter = get_peft_model_state_dict(module, state_dict=dict(weights), adapter_name=POLICY_ADAPTER)
    _write_weights({PEFT_PREFIX + name: weight for name, weight in adapter.items()}, folder / ADAPTER_FILE)
    cast(dict[str, "LoraConfig"], module.peft_config)[POLICY_ADAPTER].save_pretrained(str(folder))


def _read_policy(module: nn.Module, folder: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    read_json(folder / "adapter_config.json")
    adapter = {
        name.removeprefix(PEFT_PREFIX): weight for name, weight in read_safetensors(folder / ADAPTER_FILE).items()
    }
    # Without memory for the adapter until it is known that the weights of the file fit.
    config = LoraConfig.from_pretrained(str(folder))
    inject_adapter_in_model(config, module, adapter_name=POLICY_ADAPTER, low_cpu_mem_usage=True)
    report = set_peft_model_state_dict(module, adapter, adapter_name=POLICY_ADAPTER, low_cpu_mem_usage=True)
    absent = [name for name in report.missing_keys if ".lora_" in name]
    if absent or report.unexpected_keys:
        raise ValueError(f"LoRA weights of {[*absent, *report.unexpected_keys][0]} are only in one of them")

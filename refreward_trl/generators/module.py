"""Any `nn.Module` LR -> SR as a generator, so that any SR network can be aligned by reward gradients."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Self, cast

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from refreward_trl.errors import ConfigError
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

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


class ModuleGenerator(Generator):
    """A network whose forward is the whole enlargement; its "latent" is the LR image and its prediction the SR image.

    Deterministic and without a latent to perturb, so it can be aligned by ReFL, not by a policy gradient.

    Args:
        module: `(b, 3, h, w)` in [0, 1] -> `(b, 3, h * scale, w * scale)`.
        scale: Enlargement factor.
    """

    def __init__(self, module: nn.Module, scale: int = 4) -> None:
        if scale < 1:
            raise ConfigError(f"scale is {scale}", where="scale", fix="use a whole number of at least 1")
        self.denoiser = module
        self.scale = scale

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
    ) -> Float[Tensor, "b 3 H W"]:
        """Returns the network's SR image, float32, not clamped.

        Raises:
            ConfigError: If the image has not `scale` times the size of the LR image.
        """
        network = self.denoiser if model is None else model
        image = network(z.to(floating_dtype(network))).float()
        if image.shape != (len(z), 3, *cond.size):
            raise ConfigError(
                f"the network returned {tuple(image.shape)} for an LR image of {tuple(z.shape)}",
                where="generator",
                fix=f"it must enlarge {self.scale} times; set scale to what the network does",
            )
        return image

    def decode(self, z: Tensor, cond: Condition, *, checkpoint: bool = False) -> Float[Tensor, "b 3 H W"]:
        """Returns `z`: the prediction is the image."""
        return z

    def policy(
        self,
        mean: Tensor,
        *,
        sigma: float,
        noise: str = "lowfreq",
        cell: int = 4,
        direction: Tensor | None = None,
    ) -> GaussianLatentPolicy:
        """Refused: raises `ConfigError`."""
        raise ConfigError(
            "a plain network has no latent for a policy to perturb: noise on its pixels is noise in the image",
            where="generator",
            fix="align it by reward gradients (refl), or use a latent generator",
        )

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
        cls, folder: str | PathLike[str], *, module: nn.Module, scale: int | None = None
    ) -> Self:
        """Loads saved weights into `module`, which the caller builds: a checkpoint never names code to run.

        Raises:
            CheckpointError: If a file is missing or corrupt, or does not fit `module`.
        """
        source = Path(folder)
        numbers = read_numbers(source, cls.__name__)
        weights = read_safetensors(source / WEIGHTS_FILE)
        generator = cls(module, numbers.get("scale", 4) if scale is None else scale)
        try:
            module.load_state_dict(weights)
            if (source / "policy").is_dir():
                _read_policy(module, source / "policy")
                generator._freeze_all_but_policy()
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise damaged(source, f"the weights do not fit the {type(module).__name__}: {last_line(error)}") from error
        return generator

    def _inject_adapter(self, lora_config: LoraConfig) -> None:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(lora_config, self.denoiser, adapter_name=POLICY_ADAPTER)


def load_module_generator(
    source: str, *, scale: int = 4, weights: str | PathLike[str] | None = None
) -> ModuleGenerator:
    """Makes a `ModuleGenerator` of "package.module:attribute": an `nn.Module`, or a class or function without
    arguments that makes one.

    Args:
        source: Where the module is; importable from the working directory too.
        scale: Enlargement factor.
        weights: Folder of a saved `ModuleGenerator` to load into it.

    Raises:
        ConfigError: If the name leads nowhere or not to an `nn.Module`.
    """
    module_name, _, attribute = source.partition(":")
    try:
        found = getattr(_import_from_here(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"cannot import it: {error}",
            where=source,
            fix="write package.module:attribute, with the package installed or in the working directory",
        ) from error
    module = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"it is a {type(module).__name__}, not an nn.Module",
            where=source,
            fix="name an nn.Module (b, 3, h, w) -> (b, 3, h * scale, w * scale), or a function that returns one",
        )
    return (
        ModuleGenerator(module, scale) if weights is None else ModuleGenerator.from_pretrained(weights, module=module)
    )


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

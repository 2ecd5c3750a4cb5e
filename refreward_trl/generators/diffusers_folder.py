"""A latent generator as a folder that stock diffusers and peft open part by part.

    unet/ vae/ scheduler/            what `from_pretrained` of the stock classes reads
    policy/                          the LoRA policy, what `load_lora_adapter` of the U-Net reads
    generator_config.json            format_version, class, the numbers of the generator
    prompt_embeds.safetensors        the null prompt

No class is made because a file names it, except the VAE classes listed here.
"""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from refreward_trl.errors import CheckpointError
from refreward_trl.generators.base import POLICY_ADAPTER
from refreward_trl.generators.folders import (
    check_safetensors,
    damaged,
    last_line,
    read_json,
    read_numbers,
    read_safetensors,
    write_header,
)
from refreward_trl.model_folders import check_index, check_size

PROMPT_FILE = "prompt_embeds.safetensors"

VAE_CLASSES: dict[str, type[AutoencoderTiny] | type[AutoencoderKL]] = {
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderKL": AutoencoderKL,
}

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass
class GeneratorParts:
    """What a generator folder holds; the U-Net carries the LoRA policy if the folder has one."""

    numbers: dict[str, Any]
    unet: UNet2DConditionModel
    vae: AutoencoderTiny | AutoencoderKL
    prompt_embeds: Tensor


def write_generator_folder(
    folder: Path,
    *,
    class_name: str,
    numbers: Mapping[str, Any],
    unet: UNet2DConditionModel,
    unet_weights: Mapping[str, Tensor],
    vae: AutoencoderTiny | AutoencoderKL,
    scheduler: DDPMScheduler,
    prompt_embeds: Tensor,
) -> None:
    """Writes a generator folder.

    Args:
        folder: Made if missing.
        class_name: The generator's class.
        numbers: Its numbers, JSON values.
        unet: The denoiser, with or without a LoRA policy; only its structure is used.
        unet_weights: All weights of the denoiser, keyed as its state dict (with the adapter's layers, if it has one).
        vae: The VAE.
        scheduler: Training schedule.
        prompt_embeds: `(1, tokens, dim)`.

    Raises:
        CheckpointError: If `unet_weights` are not those of `unet`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base_weights = {
        name.replace(".base_layer.", "."): weight
        for name, weight in unet_weights.items()
        if not _is_adapter_weight(name)
    }
    base = _with_weights(_same_structure(unet), base_weights)
    base.save_pretrained(folder / "unet")
    if (folder / "policy").is_dir():
        # Left by an earlier save, it would be loaded on top of weights it was never trained with.
        shutil.rmtree(folder / "policy")
    if len(base_weights) < len(unet_weights):
        _write_policy(folder / "policy", unet, unet_weights)
    _with_weights(_same_structure(vae), vae.state_dict()).save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    save_file({"prompt_embeds": prompt_embeds.contiguous().cpu()}, folder / PROMPT_FILE)
    write_header(folder, class_name, numbers)


def read_generator_folder(folder: Path, *, class_name: str, dtype: torch.dtype) -> GeneratorParts:
    """Reads and checks what `write_generator_folder` wrote; the networks come in eval mode and in `dtype`.

    Raises:
        CheckpointError: If a part is missing, corrupt, or of another version or class.
    """
    numbers = read_numbers(folder, class_name)
    unet = _read_model(UNet2DConditionModel, folder / "unet", dtype)
    if (folder / "policy").is_dir():
        _read_policy(folder / "policy", unet)
    vae = _read_model(_vae_class(folder / "vae" / "config.json"), folder / "vae", dtype)
    read_json(folder / "scheduler" / "scheduler_config.json")
    prompts = read_safetensors(folder / PROMPT_FILE)
    if "prompt_embeds" not in prompts:
        raise damaged(folder / PROMPT_FILE, "it has no tensor named prompt_embeds")
    return GeneratorParts(numbers, unet, vae, prompts["prompt_embeds"])


def _vae_class(path: Path) -> type[AutoencoderTiny] | type[AutoencoderKL]:
    name = read_json(path).get("_class_name")
    if name not in VAE_CLASSES:
        raise CheckpointError(
            f"the VAE is a {name!r}", where=str(path), fix=f"supported classes: {', '.join(VAE_CLASSES)}"
        )
    return VAE_CLASSES[name]


def _read_model(model_class: type[ModelT], folder: Path, dtype: torch.dtype) -> ModelT:
    """Stock `from_pretrained`, but strict: left alone it warns about missing weights and keeps random numbers."""
    config = folder / "config.json"
    read_json(config)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise CheckpointError("no safetensors weights", where=str(folder), fix="copy the whole generator folder again")
    for path in weights:
        check_safetensors(path)
    check_size(config)
    for path in folder.glob("*.index.json"):
        check_index(path)
    try:
        with _quiet_diffusers():
            model, report = cast(Any, model_class).from_pretrained(
                folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, SafetensorError) as error:
        raise damaged(folder, last_line(error)) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise damaged(folder, f"{kind.replace('_', ' ')}: {', '.join(map(str, list(report[kind])[:3]))}")
    return model.eval()


def _read_policy(folder: Path, unet: UNet2DConditionModel) -> None:
    from peft.utils import get_peft_model_state_dict

    saved = read_safetensors(folder / LORA_WEIGHT_NAME_SAFE)
    try:
        with _quiet_diffusers():
            unet.load_lora_adapter(
                folder,
                prefix=None,  # pyright: ignore[reportArgumentType] (documented as optional)
                adapter_name=POLICY_ADAPTER,
                weight_name=LORA_WEIGHT_NAME_SAFE,
                local_files_only=True,
            )
        loaded = get_peft_model_state_dict(unet, adapter_name=POLICY_ADAPTER)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise damaged(folder, f"the LoRA policy does not fit the U-Net: {last_line(error)}") from error
    if set(loaded) != set(saved):
        name = min(set(loaded) ^ set(saved))
        raise damaged(folder, f"the LoRA policy does not fit the U-Net: {name} is only in one of them")


def _write_policy(folder: Path, unet: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> None:
    lora_config = copy.deepcopy(unet.peft_config[POLICY_ADAPTER])
    shell = _same_structure(unet)
    with torch.device("meta"):
        shell.add_adapter(lora_config, adapter_name=POLICY_ADAPTER)
    with _quiet_diffusers():
        _with_weights(shell, weights).save_lora_adapter(folder, adapter_name=POLICY_ADAPTER)


def _same_structure(model: ModelT) -> ModelT:
    """Returns a model of the same configuration without weights, and without the path it was once loaded from."""
    known = inspect.signature(type(model)).parameters
    with torch.device("meta"):
        return type(model)(**{name: value for name, value in cast(Any, model).config.items() if name in known})


def _with_weights(model: ModelT, weights: Mapping[str, Tensor]) -> ModelT:
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights to save are not those of the {type(model).__name__}: {error}",
            where="state_dict",
            fix="pass a state dict keyed like generator.denoiser.state_dict(), of the unwrapped module",
        ) from error
    return model


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Holds back what diffusers logs about its own AutoencoderTiny configs, and what our errors say better."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _is_adapter_weight(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))

"""A latent generator as a folder that stock diffusers and peft open part by part.

    unet/ or transformer/            the denoiser: what `from_pretrained` of the stock class reads
    vae/ scheduler/                  the same of the other parts
    policy/                          the LoRA policy, what `load_lora_adapter` of the denoiser reads
    generator_config.json            format_version, class, the numbers of the generator, perhaps its origin
    prompt_embeds.safetensors        the fixed prompt
    origin.safetensors               the tensors of the published checkpoint it was made of, if it was

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
from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from refreward_trl.errors import CheckpointError
from refreward_trl.generators.base import POLICY_ADAPTER
from refreward_trl.generators.folders import (
    PROMPT_FILE,
    check_safetensors,
    damaged,
    last_line,
    read_json,
    read_numbers,
    read_safetensors,
    write_header,
)
from refreward_trl.generators.origin import ORIGIN_FACTS, Origin
from refreward_trl.generators.prompts import PromptEmbeds
from refreward_trl.model_folders import check_index, check_size

ORIGIN_FILE = "origin.safetensors"
ORIGIN_KEY = "origin"

DENOISER_FOLDERS: dict[type[nn.Module], str] = {UNet2DConditionModel: "unet", SD3Transformer2DModel: "transformer"}
"""Class of a denoiser -> where diffusers keeps it."""

VAE_CLASSES: dict[str, type[AutoencoderTiny] | type[AutoencoderKL]] = {
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderKL": AutoencoderKL,
}

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass
class GeneratorParts:
    """What a generator folder holds; the denoiser carries the LoRA policy if the folder has one."""

    numbers: dict[str, Any]
    denoiser: Any
    vae: AutoencoderTiny | AutoencoderKL
    prompt: PromptEmbeds
    origin: Origin | None


def write_generator_folder(
    folder: Path,
    *,
    class_name: str,
    numbers: Mapping[str, Any],
    denoiser: nn.Module,
    denoiser_weights: Mapping[str, Tensor],
    vae: AutoencoderTiny | AutoencoderKL,
    scheduler: Any,
    prompt: PromptEmbeds,
    origin: Origin | None = None,
) -> None:
    """Writes a generator folder.

    Args:
        folder: Made if missing.
        class_name: The generator's class.
        numbers: Its numbers, JSON values.
        denoiser: The denoiser, with or without a LoRA policy; only its structure is used.
        denoiser_weights: All weights of the denoiser, keyed as its state dict (with the adapter's layers, if it has
            one).
        vae: The VAE.
        scheduler: Training schedule.
        prompt: The fixed prompt.
        origin: The published checkpoint it was made of.

    Raises:
        CheckpointError: If `denoiser_weights` are not those of `denoiser`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base_weights = without_adapter(denoiser_weights)
    write_model(denoiser, base_weights, folder / DENOISER_FOLDERS[type(denoiser)])
    if (folder / "policy").is_dir():
        # Left by an earlier save, it would be loaded on top of weights it was never trained with.
        shutil.rmtree(folder / "policy")
    if len(base_weights) < len(denoiser_weights):
        write_policy(folder / "policy", denoiser, denoiser_weights)
    write_model(vae, vae.state_dict(), folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    embeds = {"prompt_embeds": prompt.embeds} | ({} if prompt.pooled is None else {"pooled_embeds": prompt.pooled})
    save_file({name: tensor.contiguous().cpu() for name, tensor in embeds.items()}, folder / PROMPT_FILE)
    if origin is None:
        (folder / ORIGIN_FILE).unlink(missing_ok=True)
        write_header(folder, class_name, numbers)
    else:
        # clone: the tensors may be views of a file that is mapped into memory.
        save_file({name: tensor.clone().contiguous() for name, tensor in origin.tensors.items()}, folder / ORIGIN_FILE)
        write_header(
            folder, class_name, {**numbers, ORIGIN_KEY: {name: getattr(origin, name) for name in ORIGIN_FACTS}}
        )


def read_generator_folder(
    folder: Path, *, class_name: str, denoiser_class: type[nn.Module], dtype: torch.dtype
) -> GeneratorParts:
    """Reads and checks what `write_generator_folder` wrote; the networks come in eval mode and in `dtype`.

    Raises:
        CheckpointError: If a part is missing, corrupt, or of another version or class.
    """
    numbers = read_numbers(folder, class_name)
    origin = _read_origin(folder, numbers.pop(ORIGIN_KEY, None))
    denoiser = read_model(denoiser_class, folder / DENOISER_FOLDERS[denoiser_class], dtype)
    if (folder / "policy").is_dir():
        _read_policy(folder / "policy", denoiser)
    vae = read_vae(folder / "vae", dtype)
    read_json(folder / "scheduler" / "scheduler_config.json")
    prompts = read_safetensors(folder / PROMPT_FILE)
    if "prompt_embeds" not in prompts:
        raise damaged(folder / PROMPT_FILE, "it has no tensor named prompt_embeds")
    prompt = PromptEmbeds(prompts["prompt_embeds"], prompts.get("pooled_embeds"))
    return GeneratorParts(numbers, denoiser, vae, prompt, origin)


def without_adapter(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of the network under its LoRA layers, keyed as if it had none."""
    return {
        name.replace(".base_layer.", "."): weight for name, weight in weights.items() if not _is_adapter_weight(name)
    }


def write_model(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes weights as a model of the same configuration, without the path it was once loaded from."""
    cast(Any, _with_weights(_same_structure(model), weights)).save_pretrained(folder)


def read_vae(folder: Path, dtype: torch.dtype) -> AutoencoderTiny | AutoencoderKL:
    """Reads a VAE of a class that is known. Raises `CheckpointError` for any other, or if it is damaged."""
    return read_model(_vae_class(folder / "config.json"), folder, dtype)


def _read_origin(folder: Path, facts: Any) -> Origin | None:
    if facts is None:
        return None
    if not isinstance(facts, dict) or set(facts) != set(ORIGIN_FACTS):
        raise damaged(folder, "its origin is not described as this version does")
    return Origin(**facts, tensors=read_safetensors(folder / ORIGIN_FILE))


def _vae_class(path: Path) -> type[AutoencoderTiny] | type[AutoencoderKL]:
    name = read_json(path).get("_class_name")
    if name not in VAE_CLASSES:
        raise CheckpointError(
            f"the VAE is a {name!r}", where=str(path), fix=f"supported classes: {', '.join(VAE_CLASSES)}"
        )
    return VAE_CLASSES[name]


def read_model(model_class: type[ModelT], folder: Path, dtype: torch.dtype) -> ModelT:
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


def _read_policy(folder: Path, denoiser: Any) -> None:
    from peft.utils import get_peft_model_state_dict

    saved = read_safetensors(folder / LORA_WEIGHT_NAME_SAFE)
    try:
        with _quiet_diffusers():
            denoiser.load_lora_adapter(
                folder,
                prefix=None,  # pyright: ignore[reportArgumentType] (documented as optional)
                adapter_name=POLICY_ADAPTER,
                weight_name=LORA_WEIGHT_NAME_SAFE,
                local_files_only=True,
            )
        loaded = get_peft_model_state_dict(denoiser, adapter_name=POLICY_ADAPTER)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise damaged(folder, f"the LoRA policy does not fit the denoiser: {last_line(error)}") from error
    if set(loaded) != set(saved):
        name = min(set(loaded) ^ set(saved))
        raise damaged(folder, f"the LoRA policy does not fit the denoiser: {name} is only in one of them")


def write_policy(folder: Path, denoiser: Any, weights: Mapping[str, Tensor]) -> None:
    """Writes the LoRA policy of a denoiser as `load_lora_adapter` reads it, with the weights given."""
    lora_config = copy.deepcopy(denoiser.peft_config[POLICY_ADAPTER])
    shell = _same_structure(denoiser)
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

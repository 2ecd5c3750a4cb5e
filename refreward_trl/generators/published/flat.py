"""Checkpoints that are one adapter: HYPIR's flat state dict, and TSD-SR's folder of safetensors files.

Their lora_alpha is their rank, so that updates are not scaled. The authors' loaders know the layers beforehand, so an
exported policy may change no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.generators.folders import read_safetensors
from refreward_trl.generators.low_rank import LowRank, adapter_state, split_adapters, stack
from refreward_trl.generators.origin import Updates
from refreward_trl.generators.prompts import PromptEmbeds
from refreward_trl.generators.torch_pickles import FIX, read_torch_file, read_torch_tensor

Facts = dict[str, Any]

HYPIR_ADAPTER = "default"
TSD_PREFIX = "transformer."
"""Both files of TSD-SR have it, also the one of the VAE."""
TSD_FILES = {"denoiser": "transformer.safetensors", "vae": "vae.safetensors"}
TSD_PROMPTS = {"prompt_embeds": "prompt_embeds.pt", "pooled_embeds": "pool_embeds.pt"}


class Hypir:
    """`HYPIR_sd2.pth`."""

    @staticmethod
    def matches(content: Mapping[str, Any]) -> bool:
        """Tells whether a dictionary is of this format."""
        return bool(content) and all(f".{HYPIR_ADAPTER}.weight" in str(name) for name in content)

    @staticmethod
    def read(path: Path) -> tuple[Facts, dict[str, Tensor]]:
        """Returns the tensors of the file. Raises `CheckpointError` if it cannot be opened safely."""
        return {}, dict(read_torch_file(path))

    @staticmethod
    def updates(facts: Facts, tensors: Mapping[str, Tensor], path: Path) -> Updates:
        """Returns what the checkpoint changes. Raises `CheckpointError` for any key besides its adapter's."""
        return Updates(denoiser=(_only_adapter(tensors, HYPIR_ADAPTER, path),))

    @staticmethod
    def write(path: Path, facts: Facts, tensors: Mapping[str, Tensor], policy: Mapping[str, LowRank]) -> None:
        """Writes the checkpoint with a policy added to it. Raises `ConfigError` for layers it does not have."""
        own = _only_adapter(tensors, HYPIR_ADAPTER, path)
        torch.save(adapter_state(_joined(own, policy), HYPIR_ADAPTER), path)


class TsdSr:
    """A folder with `transformer.safetensors`, `vae.safetensors`, `prompt_embeds.pt` and `pool_embeds.pt`."""

    @staticmethod
    def read(path: Path) -> tuple[Facts, dict[str, Tensor]]:
        """Returns the tensors of all files. Raises `CheckpointError` if one is missing or cannot be read."""
        tensors = {}
        for part, name in TSD_FILES.items():
            state = read_safetensors(path / name)
            tensors |= {f"{part}/{key}": tensor for key, tensor in state.items()}
        for part, name in TSD_PROMPTS.items():
            tensors[part] = read_torch_tensor(path / name)
        return {}, tensors

    @staticmethod
    def updates(facts: Facts, tensors: Mapping[str, Tensor], path: Path) -> Updates:
        """Returns what the checkpoint changes. Raises `CheckpointError` for any key besides its adapters'."""
        embeds = tensors["prompt_embeds"].float()
        return Updates(
            denoiser=(_only_adapter(_tsd_state("denoiser", tensors, path), "", path),),
            vae=(_only_adapter(_tsd_state("vae", tensors, path), "", path),),
            prompt=PromptEmbeds(
                embeds if embeds.ndim == 3 else embeds[None], tensors["pooled_embeds"].float().reshape(1, -1)
            ),
        )

    @staticmethod
    def write(path: Path, facts: Facts, tensors: Mapping[str, Tensor], policy: Mapping[str, LowRank]) -> None:
        """Writes the folder with a policy added. Raises `ConfigError` for layers the checkpoint does not have."""
        own = _only_adapter(_tsd_state("denoiser", tensors, path), "", path)
        states = {
            "denoiser": adapter_state(_joined(own, policy)),
            "vae": _tsd_state("vae", tensors, path),
        }
        path.mkdir(parents=True, exist_ok=True)
        for part, name in TSD_FILES.items():
            save_file({TSD_PREFIX + key: tensor.contiguous() for key, tensor in states[part].items()}, path / name)
        for part, name in TSD_PROMPTS.items():
            torch.save(tensors[part], path / name)


def _tsd_state(part: str, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    state = {}
    for key, tensor in tensors.items():
        if not key.startswith(f"{part}/"):
            continue
        name = key.removeprefix(f"{part}/")
        if not name.startswith(TSD_PREFIX):
            raise CheckpointError(
                f"unexpected key {name}: all begin with {TSD_PREFIX}", where=str(path / TSD_FILES[part]), fix=FIX
            )
        state[name.removeprefix(TSD_PREFIX)] = tensor
    return state


def _only_adapter(state: Mapping[str, Tensor], adapter: str, path: Path) -> dict[str, LowRank]:
    adapters, rest = split_adapters(state, alpha=None, where=str(path))
    unexpected = [*rest, *(f"adapter {name}" for name in adapters if name != adapter)]
    if unexpected or not adapters:
        raise CheckpointError(
            f"unexpected in its state dict: {unexpected[0]}" if unexpected else "it holds no LoRA weights",
            where=str(path),
            fix=FIX,
        )
    return adapters[adapter]


def _joined(own: Mapping[str, LowRank], policy: Mapping[str, LowRank]) -> dict[str, LowRank]:
    foreign = sorted(set(policy) - set(own))
    if foreign:
        raise ConfigError(
            f"the policy changes {foreign[0]}, which the format has no place for",
            where="export",
            fix="export to a diffusers folder, or train with lora_target_modules that the checkpoint has",
        )
    if not policy:
        return dict(own)
    rank = max(update.rank for update in own.values()) + max(update.rank for update in policy.values())
    return {
        layer: stack([update, *([policy[layer]] if layer in policy else [])], rank=rank, scale=1.0)
        for layer, update in own.items()
    }

"""`osediff.pkl`: three adapters of the U-Net, its whole `conv_in`, and an adapter of the VAE's encoder.

GDPO-SR's training code writes the same format, with adapters of the VAE's decoder and middle besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refreward_trl.generators.low_rank import LowRank
from refreward_trl.generators.origin import Updates
from refreward_trl.generators.published.grouped import PARTS, Group, read_groups, with_policy
from refreward_trl.generators.torch_pickles import read_torch_file, take_names, take_rank, take_tensors

REPLACED = ("conv_in.base_layer.weight", "conv_in.base_layer.bias")
"""The first convolution is trained as a whole under its adapter. Without these keys the output is silently worse."""

Facts = dict[str, Any]


def matches(content: Mapping[str, Any]) -> bool:
    """Tells whether a dictionary is of this format."""
    return "rank_unet" in content and "unet_lora_encoder_modules" in content


def read(path: Path) -> tuple[Facts, dict[str, Tensor]]:
    """Returns the ranks and lists of the file, and its tensors under `unet.` and `vae.`.

    Raises:
        CheckpointError: The file cannot be opened safely, or a part of it is missing.
    """
    content = read_torch_file(path)
    facts: Facts = {key: take_rank(content, key, path) for key in ("rank_unet", "rank_vae")}
    facts |= {f"unet_lora_{part}_modules": take_names(content, f"unet_lora_{part}_modules", path) for part in PARTS}
    facts["vae_lora_encoder_modules"] = take_names(content, "vae_lora_encoder_modules", path)
    for key in ("vae_lora_decoder_modules", "vae_lora_others_modules"):
        if key in content:
            facts[key] = take_names(content, key, path)
    tensors = {f"unet.{name}": tensor for name, tensor in take_tensors(content, "state_dict_unet", path).items()}
    tensors |= {f"vae.{name}": tensor for name, tensor in take_tensors(content, "state_dict_vae", path).items()}
    return facts, tensors


def updates(facts: Facts, tensors: Mapping[str, Tensor], path: Path) -> Updates:
    """Returns what the checkpoint changes. Raises `CheckpointError` unless every key is there and none besides."""
    unet, replaced = read_groups(_under("unet.", tensors), list(_unet_groups(facts).values()), path, also=REPLACED)
    vae, _ = read_groups(_under("vae.", tensors), _vae_groups(facts), path)
    return Updates(
        denoiser=tuple(unet.values()),
        vae=tuple(vae.values()),
        replaced={name.replace(".base_layer.", "."): weight for name, weight in replaced.items()},
    )


def write(path: Path, facts: Facts, tensors: Mapping[str, Tensor], policy: Mapping[str, LowRank]) -> None:
    """Writes the checkpoint with a policy added to it: exactly as it was read, if there is none."""
    unet = _under("unet.", tensors)
    facts = dict(facts)
    if policy:
        groups = _unet_groups(facts)
        adapters, replaced = read_groups(unet, list(groups.values()), path, also=REPLACED)
        grown, state = with_policy(groups, adapters, policy)
        unet = state | replaced
        facts["rank_unet"] = grown["encoder"].rank
        facts |= {f"unet_lora_{part}_modules": list(group.layers) for part, group in grown.items()}
    torch.save({**facts, "state_dict_unet": unet, "state_dict_vae": _under("vae.", tensors)}, path)


def _unet_groups(facts: Facts) -> dict[str, Group]:
    return {part: Group(f"default_{part}", facts[f"unet_lora_{part}_modules"], facts["rank_unet"]) for part in PARTS}


def _vae_groups(facts: Facts) -> list[Group]:
    return [
        Group(f"default_{part}", facts[f"vae_lora_{part}_modules"], facts["rank_vae"])
        for part in PARTS
        if f"vae_lora_{part}_modules" in facts
    ]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

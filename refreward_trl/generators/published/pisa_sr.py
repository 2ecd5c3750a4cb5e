"""`pisa_sr.pkl`: three adapters of the U-Net for pixels, three more for semantics on top of them."""

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

LEVELS = ("pix", "sem")

Facts = dict[str, Any]


def matches(content: Mapping[str, Any]) -> bool:
    """Tells whether a dictionary is of this format."""
    return "lora_rank_unet_pix" in content


def read(path: Path) -> tuple[Facts, dict[str, Tensor]]:
    """Returns the ranks and lists of the file, and its tensors. Raises `CheckpointError` as `osediff.read`."""
    content = read_torch_file(path)
    facts: Facts = {f"lora_rank_unet_{level}": take_rank(content, f"lora_rank_unet_{level}", path) for level in LEVELS}
    for level in LEVELS:
        keys = [f"unet_lora_{part}_modules_{level}" for part in PARTS]
        facts |= {key: take_names(content, key, path) for key in keys}
    return facts, dict(take_tensors(content, "state_dict_unet", path))


def updates(facts: Facts, tensors: Mapping[str, Tensor], path: Path) -> Updates:
    """Returns what the checkpoint changes, the three adapters for pixels first. Raises `CheckpointError` unless every
    key is there and none besides."""
    levels = [_groups(facts, level) for level in LEVELS]
    adapters, _ = read_groups(tensors, [group for groups in levels for group in groups.values()], path)
    return Updates(denoiser=tuple(adapters.get(group.adapter, {}) for groups in levels for group in groups.values()))


def write(path: Path, facts: Facts, tensors: Mapping[str, Tensor], policy: Mapping[str, LowRank]) -> None:
    """Writes the checkpoint with a policy added to its semantic adapters: as it was read, if there is none."""
    facts, state = dict(facts), dict(tensors)
    if policy:
        pixel, semantic = (_groups(facts, level) for level in LEVELS)
        adapters, _ = read_groups(tensors, [*pixel.values(), *semantic.values()], path)
        grown, trained = with_policy(semantic, adapters, policy)
        state = {name: weight for name, weight in state.items() if name.split(".")[-2].endswith("_pix")} | trained
        facts["lora_rank_unet_sem"] = grown["encoder"].rank
        facts |= {f"unet_lora_{part}_modules_sem": list(group.layers) for part, group in grown.items()}
    torch.save({**facts, "state_dict_unet": state}, path)


def _groups(facts: Facts, level: str) -> dict[str, Group]:
    return {
        part: Group(
            f"default_{part}_{level}", facts[f"unet_lora_{part}_modules_{level}"], facts[f"lora_rank_unet_{level}"]
        )
        for part in PARTS
    }

"""Checkpoints whose layers are shared out among adapters for the encoder, the decoder and the middle of a U-Net.

The file lists the layers of each adapter. These lists count, not a rule: families put `conv_out` into different ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from refreward_trl.errors import CheckpointError
from refreward_trl.generators.low_rank import LowRank, adapter_state, split_adapters, stack
from refreward_trl.generators.torch_pickles import FIX

ALPHA = 8
"""lora_alpha of these families: they never store it, and rely on peft's default of that time and of today."""

PARTS = ("encoder", "decoder", "others")


@dataclass(frozen=True)
class Group:
    """One adapter.

    Attributes:
        adapter: Its name in the file's keys.
        layers: The layers that it changes, as listed in the file.
        rank: Its rank.
    """

    adapter: str
    layers: Sequence[str]
    rank: int


def read_groups(
    state: Mapping[str, Tensor], groups: Sequence[Group], path: Path, *, also: Sequence[str] = ()
) -> tuple[dict[str, dict[str, LowRank]], dict[str, Tensor]]:
    """Sorts a state dict by its groups.

    Args:
        state: The state dict.
        groups: The adapters that the file lists.
        path: The file, for messages.
        also: Keys that must be there besides.

    Returns:
        Adapter -> layer -> update, and the entries under `also`.

    Raises:
        CheckpointError: A key is missing, unexpected, or has another rank than the file says.
    """
    adapters, rest = split_adapters(state, alpha=ALPHA, where=str(path))
    expected = {f"{layer}.lora_A.{group.adapter}.weight" for group in groups for layer in group.layers}
    found = {f"{layer}.lora_A.{name}.weight" for name, layers in adapters.items() for layer in layers}
    missing = sorted(expected - found) + [key for key in also if key not in rest]
    unexpected = sorted(found - expected) + sorted(set(rest) - set(also))
    for kind, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(f"{kind} in its state dict: {keys[0]}{more}", where=str(path), fix=FIX)
    for group in groups:
        for layer, update in adapters.get(group.adapter, {}).items():
            if update.rank != group.rank:
                raise CheckpointError(
                    f"layer {layer} has the rank {update.rank}, the file says {group.rank}", where=str(path), fix=FIX
                )
    return adapters, rest


def part_of(layer: str) -> str:
    """Returns the part of the U-Net that a layer belongs to, for layers that no list names yet."""
    if layer.startswith(("down_blocks.", "conv_in")):
        return "encoder"
    return "decoder" if layer.startswith(("up_blocks.", "conv_out")) else "others"


def with_policy(
    groups: Mapping[str, Group], updates: Mapping[str, Mapping[str, LowRank]], policy: Mapping[str, LowRank]
) -> tuple[dict[str, Group], dict[str, Tensor]]:
    """Adds a trained policy to the adapters of a checkpoint. Their rank becomes the sum of both.

    Args:
        groups: Part of the U-Net -> its adapter.
        updates: Adapter -> layer -> update.
        policy: Layer -> update.

    Returns:
        The new groups, whose lists have grown by layers that only the policy changes, and their state dict.
    """
    rank = max(group.rank for group in groups.values()) + max(update.rank for update in policy.values())
    listed = {layer for group in groups.values() for layer in group.layers}
    added: dict[str, list[str]] = {part: [] for part in groups}
    for layer in policy:
        if layer not in listed:
            added[part_of(layer)].append(layer)
    grown, state = {}, {}
    for part, group in groups.items():
        layers = [*group.layers, *added[part]]
        own = updates.get(group.adapter, {})
        joined = {
            layer: stack(
                [update for source in (own, policy) if (update := source.get(layer)) is not None],
                rank=rank,
                scale=ALPHA / rank,
            )
            for layer in dict.fromkeys(layers)
        }
        grown[part] = Group(group.adapter, layers, rank)
        state |= adapter_state(joined, group.adapter)
    return grown, state

"""Low-rank updates of linear and convolutional layers as plain tensors: merged, stacked, and cut out of state dicts.

Published LoRA checkpoints do not say by how much an update is scaled; `LowRank` does, so that nothing is left to the
defaults of the library that happens to be installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refreward_trl.errors import CheckpointError

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


@dataclass(frozen=True)
class LowRank:
    """`weight + scale * up @ down` of one layer.

    Attributes:
        down: `(r, in)`, or `(r, in, kh, kw)` of a convolution ("lora_A").
        up: `(out, r)`, or `(out, r, 1, 1)` of a convolution ("lora_B").
        scale: lora_alpha / r.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.down)

    def delta(self) -> Tensor:
        """Returns the change of the weight, float32, in the weight's shape."""
        flat = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * flat.reshape(len(self.up), *self.down.shape[1:])

    def rescaled(self, scale: float) -> LowRank:
        """Returns the same update under another scale, which goes into `up`."""
        return LowRank(self.down, self.up * (self.scale / scale), scale)

    def padded(self, rank: int) -> LowRank:
        """Returns the same update with `rank` directions, those that are new being zero."""
        more = rank - self.rank
        down = torch.cat([self.down, self.down.new_zeros(more, *self.down.shape[1:])])
        up = torch.cat([self.up, self.up.new_zeros(len(self.up), more, *self.up.shape[2:])], 1)
        return LowRank(down, up, self.scale)


def stack(updates: Iterable[LowRank], *, rank: int, scale: float) -> LowRank:
    """Returns the sum of updates of one layer as a single one of a given rank and scale, exact up to rounding."""
    parts = [update.rescaled(scale) for update in updates]
    joined = LowRank(torch.cat([part.down for part in parts]), torch.cat([part.up for part in parts], 1), scale)
    return joined.padded(rank)


def merge(network: nn.Module, updates: Mapping[str, LowRank], *, where: str, base: str) -> None:
    """Adds updates to the weights of a network, in place, computed in float32.

    Args:
        network: The base.
        updates: Name of a layer -> its update.
        where: The checkpoint, for messages.
        base: What the base is called, for messages.

    Raises:
        CheckpointError: A layer is missing or has another shape; nothing has been changed then.
    """
    weights = {}
    for name, update in updates.items():
        layer = _layer(network, name)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            raise CheckpointError(
                f"it changes the layer {name}, which {base} has not",
                where=where,
                fix="name the base model that the checkpoint was trained on",
            )
        if update.down.shape[1:] != weight.shape[1:] or len(update.up) != len(weight):
            wanted = (len(update.up), *update.down.shape[1:])
            raise CheckpointError(
                f"it was trained on another base model: layer {name} has the shape {tuple(weight.shape)} in {base}, "
                f"{wanted} in the checkpoint",
                where=where,
                fix="name the base model that the checkpoint was trained on",
            )
        weights[name] = weight
    with torch.no_grad():
        for name, update in updates.items():
            weights[name].copy_(weights[name].float() + update.delta().to(weights[name].device))


def split_adapters(
    state: Mapping[str, Tensor], *, alpha: float | None, where: str
) -> tuple[dict[str, dict[str, LowRank]], dict[str, Tensor]]:
    """Sorts a state dict of `<layer>.lora_A.<adapter>.weight` entries.

    Args:
        state: The state dict; the adapter's name may be missing, and is "" then.
        alpha: lora_alpha of all adapters; None where it equals the rank, so that the scale is 1.
        where: The checkpoint, for messages.

    Returns:
        Adapter -> layer -> update, and the entries that belong to no adapter.

    Raises:
        CheckpointError: Half of an update is missing, or its halves do not fit.
    """
    halves: dict[str, dict[str, dict[str, Tensor]]] = {}
    rest = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            rest[key] = tensor
            continue
        adapter = halves.setdefault(match["adapter"] or "", {})
        adapter.setdefault(match["module"], {})[match["side"]] = tensor
    return {
        adapter: {name: _joined(name, sides, alpha, where) for name, sides in modules.items()}
        for adapter, modules in halves.items()
    }, rest


def adapter_state(updates: Mapping[str, LowRank], adapter: str = "") -> dict[str, Tensor]:
    """Returns the state dict that `split_adapters` reads."""
    suffix = f".{adapter}.weight" if adapter else ".weight"
    state = {}
    for name, update in updates.items():
        state[f"{name}.lora_A{suffix}"] = update.down.contiguous()
        state[f"{name}.lora_B{suffix}"] = update.up.contiguous()
    return state


def policy_updates(network: nn.Module, adapter: str) -> dict[str, LowRank]:
    """Returns the updates of a peft adapter that a network carries, layer by layer, on the CPU."""
    from peft.tuners.lora import LoraLayer

    updates = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            down, up = (getattr(module, side)[adapter].weight for side in ("lora_A", "lora_B"))
            updates[name] = LowRank(down.detach().cpu(), up.detach().cpu(), float(module.scaling[adapter]))
    return updates


def _layer(network: nn.Module, name: str) -> nn.Module | None:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


def _joined(name: str, sides: Mapping[str, Tensor], alpha: float | None, where: str) -> LowRank:
    if set(sides) != {"A", "B"}:
        missing = "B" if "A" in sides else "A"
        raise CheckpointError(f"{name}.lora_{missing} is missing", where=where, fix="download the checkpoint again")
    down, up = sides["A"], sides["B"]
    if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != len(down) or not len(down):
        raise CheckpointError(
            f"the halves of {name} do not fit: {tuple(down.shape)} and {tuple(up.shape)}",
            where=where,
            fix="download the checkpoint again",
        )
    return LowRank(down, up, 1.0 if alpha is None else alpha / len(down))

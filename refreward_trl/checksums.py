"""Checksums of weights: equal on all ranks while they train together, and after loading equal to what was saved."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PERIOD = 65521
"""Largest prime below 2 ** 16: positions that far apart share a factor."""


def checksums(weights: Mapping[str, Tensor]) -> Tensor:
    """Returns one int64 per tensor, computed from its bits on its device.

    Every bit and the order of the elements count: elements are multiplied by factors that depend on their position.
    """
    return torch.stack([_checksum(tensor) for tensor in weights.values()]) if weights else torch.zeros(0).long()


def digest(weights: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the names, shapes and checksums of all tensors, in order of their names."""
    weights = dict(sorted(weights.items()))
    parts = zip(weights.items(), checksums(weights).tolist(), strict=True)
    text = "\n".join(f"{name} {tuple(tensor.shape)} {number}" for (name, tensor), number in parts)
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().contiguous().flatten().view(INTEGERS[tensor.element_size()]).long()
    factors = torch.arange(len(bits), device=bits.device) % PERIOD + 1
    return (bits * factors).sum()

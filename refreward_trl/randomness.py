"""Stateless randomness: every draw is a pure function of what it is for.

Noise, degradations, crops and orders come from `stateless_generator(seed, purpose, ...)` and never from a global
random state, so that a sample looks the same on any rank, in any worker and after any resume.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stateless_seed(seed: int, purpose: str, *key: int | str) -> int:
    """Returns a 63-bit seed that depends on `seed`, `purpose` and every part of `key`, and on nothing else.

    Parts are separated and typed before hashing, so `("a", 1)`, `("a1",)` and `("a", "1")` give different seeds.
    """
    text = "\x1f".join([f"i{seed}", f"s{purpose}", *(f"{type(part).__name__[0]}{part}" for part in key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stateless_generator(seed: int, purpose: str, *key: int | str) -> torch.Generator:
    """Returns a CPU `torch.Generator` seeded by `stateless_seed(seed, purpose, *key)`."""
    import torch

    return torch.Generator().manual_seed(stateless_seed(seed, purpose, *key))

"""What a generator was made of, kept so that it can go back to where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from refreward_trl.generators.low_rank import LowRank
from refreward_trl.generators.prompts import PromptEmbeds

ORIGIN_FACTS = ("family", "file_format", "base_model", "facts", "digest")
"""Fields of `Origin` that are JSON."""


@dataclass(frozen=True)
class Origin:
    """The published checkpoint that a generator was made of.

    Attributes:
        family: Name of its family.
        file_format: Name of the format of its files; None for a merged diffusers folder, which has no other.
        base_model: Folder or hub id of the base.
        facts: What else the file says, as JSON: ranks, lists of layers.
        tensors: The file's own tensors.
        digest: Of the denoiser as it was made of them, before any training.
    """

    family: str
    file_format: str | None
    base_model: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    digest: str = ""


@dataclass(frozen=True)
class Updates:
    """What a checkpoint does to its base model.

    Attributes:
        denoiser: Low-rank updates, one mapping per adapter: a layer may be changed by several.
        vae: The same of the VAE.
        replaced: Weights of the denoiser that take the place of the base's.
        prompt: Embeddings of the fixed prompt, where the checkpoint brings them.
    """

    denoiser: tuple[Mapping[str, LowRank], ...]
    vae: tuple[Mapping[str, LowRank], ...] = ()
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    prompt: PromptEmbeds | None = None

"""Prompts of generators that were made from text-to-image models: embeddings, and the text encoder that makes them.

Most one-step SR generators run with one fixed prompt. Its embeddings are saved with the generator, so that no text
encoder is loaded unless a prompt is new.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.generators.folders import last_line, read_safetensors
from refreward_trl.generators.torch_pickles import read_torch_tensor
from refreward_trl.model_folders import check_index, check_size

MAX_CACHED = 2048
"""Prompts whose embeddings are kept, the last used; one takes about 0.3 MB."""


@dataclass(frozen=True)
class PromptEmbeds:
    """What conditions a denoiser on text.

    Attributes:
        embeds: `(b, tokens, dim)`, float32.
        pooled: `(b, pooled_dim)`, of models that take one vector more; else None.
    """

    embeds: Float[Tensor, "b tokens dim"]
    pooled: Float[Tensor, "b pooled_dim"] | None = None

    def to(self, device: torch.device | str) -> PromptEmbeds:
        """Returns them on `device`, float32 and without a graph."""
        pooled = None if self.pooled is None else self.pooled.detach().float().to(device)
        return PromptEmbeds(self.embeds.detach().float().to(device), pooled)


class PromptEncoder:
    """Texts -> embeddings by the CLIP text encoder of a base model. Each text is embedded once.

    Args:
        locate: Returns the base model's folder, with `tokenizer/` and `text_encoder/`; called when a text is new.
    """

    def __init__(self, locate: Callable[[], Path]) -> None:
        self._locate = locate
        self._networks: tuple[Any, Any] | None = None
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> PromptEmbeds:
        """Returns the embeddings `(len(texts), tokens, dim)`, float32, on the CPU.

        Raises:
            CheckpointError: The base model has no text encoder, or it cannot be read.
        """
        for text in dict.fromkeys(texts):
            if text not in self._cache:
                self._cache[text] = self._embed(text)
            self._cache.move_to_end(text)
        embeds = PromptEmbeds(torch.stack([self._cache[text] for text in texts]))
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return embeds

    def release(self) -> None:
        """Lets the text encoder go; the embeddings stay, and the next new text loads it again."""
        self._networks = None

    def _embed(self, text: str) -> Tensor:
        if self._networks is None:
            self._networks = self._load()
        tokenizer, encoder = self._networks
        tokens = tokenizer(
            text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return encoder(tokens.input_ids)[0][0].float()

    def _load(self) -> tuple[Any, Any]:
        from transformers import AutoTokenizer, CLIPTextModel

        folder = self._locate()
        for part in ("tokenizer", "text_encoder"):
            if not (folder / part).is_dir():
                raise CheckpointError(
                    f"the base model has no {part}, so that a prompt cannot be embedded",
                    where=str(folder),
                    fix="copy the folder whole, or give the embeddings of the prompt as prompt_embeds",
                )
        encoder = folder / "text_encoder"
        if (encoder / "config.json").is_file():
            check_size(encoder / "config.json")
        for path in encoder.glob("*.index.json"):
            check_index(path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            network = CLIPTextModel.from_pretrained(
                encoder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(
                f"its text encoder cannot be read: {last_line(error)}",
                where=str(folder),
                fix="copy the base model again, or give the embeddings of the prompt as prompt_embeds",
            ) from error
        return tokenizer, network.eval().requires_grad_(False)


def read_prompt_embeds(path: Path) -> PromptEmbeds:
    """Reads precomputed embeddings: a safetensors file with `prompt_embeds` and perhaps `pooled_embeds`, or a `.pt`
    file that holds one tensor.

    Raises:
        CheckpointError: The file is missing or corrupt.
        ConfigError: It does not hold embeddings `(1, tokens, dim)` or `(tokens, dim)`.
    """
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
        embeds, pooled = tensors.get("prompt_embeds"), tensors.get("pooled_embeds")
    else:
        embeds, pooled = read_torch_tensor(path), None
    if embeds is not None and embeds.ndim == 2:
        embeds = embeds[None]
    if embeds is None or embeds.ndim != 3 or len(embeds) != 1:
        raise ConfigError(
            "it holds no prompt embeddings (1, tokens, dim)",
            where=str(path),
            fix="save a tensor prompt_embeds in a safetensors file",
        )
    return PromptEmbeds(embeds.float(), pooled)

"""Asking a judge for ratings: expected rating at the answer position, differentiable in the SR pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refreward_trl.reward_model.families import single_token_id
from refreward_trl.reward_model.group_scoring import rate_with_shared_prefix
from refreward_trl.reward_model.judge import MLLMJudge
from refreward_trl.reward_model.preprocess import expected_rating, split_tiles
from refreward_trl.reward_model.question import JudgePrompt, shown_visuals
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.vision_attention import batched_vision_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RateJudge(MLLMJudge):
    """A judge that rates SR images against their LR images: one forward, no parsing, a gradient to the pixels.

    See `MLLMJudge` for the arguments.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: JudgeSpec, **limits: Any
    ) -> None:
        super().__init__(model, tokenizer, spec, **limits)
        visuals = 1 if spec.layout == "clip" else 2
        self.prompts = {
            aspect: JudgePrompt(tokenizer, self.family, text, visuals=visuals)
            for aspect, (text, _) in spec.rating_prompts.items()
        }
        self.rating_ids = torch.tensor([single_token_id(tokenizer, token) for token in spec.rating_tokens])

    def rating_logits(
        self,
        lr_image: Float[Tensor, "b 3 h w"],
        sr_image: Float[Tensor, "b 3 H W"],
        *,
        aspect: str | None = None,
        model: nn.Module | None = None,
    ) -> Float[Tensor, "b r"]:
        """Returns the logits of the rating tokens at the answer position, one forward for the whole batch.

        Args:
            lr_image: float pixels in [0, 1].
            sr_image: float pixels in [0, 1]; sides multiples of `spec.pixel_multiple`.
            aspect: Which of `spec.rating_prompts` is asked; None for the first.
            model: The module to call instead of `self.model`, for example the one a trainer prepared.

        Raises:
            DataError: Sizes that do not fit each other or the patch grid.
        """
        prompt = self.prompts[aspect or next(iter(self.prompts))]
        visuals = shown_visuals(lr_image, [sr_image], self.spec)
        return self.answer_logits(prompt, visuals, self.rating_ids, model=model)

    def expected_rating(
        self,
        lr_image: Float[Tensor, "b 3 h w"],
        sr_image: Float[Tensor, "b 3 H W"],
        *,
        aspect: str | None = None,
        model: nn.Module | None = None,
    ) -> Float[Tensor, " b"]:
        """Returns `spec`'s expected rating of one tile per row; see `rating_logits` for the arguments.

        Without `aspect`, a judge that is asked per aspect gives the weighted mean over its aspects.
        """
        asked = self.spec.rating_prompts if aspect is None else {aspect: ("", 1.0)}
        ratings = [
            weight * expected_rating(self.rating_logits(lr_image, sr_image, aspect=name, model=model), self.spec)
            for name, (_, weight) in asked.items()
        ]
        return torch.stack(ratings).sum(dim=0)

    def rate(self, lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
        """Rates whole images: the mean rating of tiles that cover them.

        Args:
            lr_image: float pixels in [0, 1].
            sr_image: float pixels in [0, 1], a whole multiple of the LR size. When it requires grad (and gradients are
                enabled) the result has a graph to it; otherwise no graph is built.

        Returns:
            One rating per image within `spec.rating_range`.

        Raises:
            DataError: Sizes that do not fit each other.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and sr_image.requires_grad):
            lr_tiles, sr_tiles, count = self._tiles(lr_image, sr_image)
            rows = self._rows(lr_tiles, sr_tiles)
            with batched_vision_attention(self.model):
                ratings = [
                    self.expected_rating(lr_part, sr_part)
                    for lr_part, sr_part in zip(lr_tiles.split(rows), sr_tiles.split(rows), strict=True)
                ]
            return torch.cat(ratings).view(-1, count).mean(dim=1).to(sr_image.device)

    def rate_group(
        self, lr_image: Float[Tensor, "3 h w"], candidates: Float[Tensor, "k 3 H W"]
    ) -> Float[Tensor, " k"]:
        """Rates the K candidates of one LR image: as `rate`, but the LR image is seen once and not K times.

        The tokens up to the first candidate (prompt and LR image) run once per tile; their keys and values are shared.
        A judge with layout `"clip"` sees LR and SR in one patch, so for it this is `rate`.

        Args:
            lr_image: float pixels in [0, 1].
            candidates: float pixels in [0, 1], a whole multiple of the LR size; gradients as in `rate`.

        Raises:
            DataError: Sizes that do not fit each other.
        """
        if self.spec.layout == "clip":
            return self.rate(lr_image.expand(len(candidates), -1, -1, -1), candidates)
        with torch.set_grad_enabled(torch.is_grad_enabled() and candidates.requires_grad):
            repeated = lr_image.expand(len(candidates), -1, -1, -1)
            lr_tiles, sr_tiles, count = self._tiles(repeated, candidates)
            sr_tiles = sr_tiles.view(len(candidates), count, *sr_tiles.shape[1:])
            with batched_vision_attention(self.model):
                return rate_with_shared_prefix(self, lr_tiles[:count], sr_tiles).mean(dim=1).to(candidates.device)

    def rate_neighbours(
        self, lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]
    ) -> Float[Tensor, " b"]:
        """Rates whole images as `rate` does; neighbouring rows with equal LR images are rated by `rate_group`."""
        starts = [0, *(row for row in range(1, len(lr_image)) if not torch.equal(lr_image[row - 1], lr_image[row]))]
        if self.spec.layout == "clip" or len(starts) == len(lr_image):
            return self.rate(lr_image, sr_image)
        ends = [*starts[1:], len(lr_image)]
        parts = [
            self.rate_group(lr_image[start], sr_image[start:end]) for start, end in zip(starts, ends, strict=True)
        ]
        return torch.cat(parts)

    def _tiles(self, lr_image: Tensor, sr_image: Tensor) -> tuple[Tensor, Tensor, int]:
        return split_tiles(lr_image.to(self.device), sr_image.to(self.device), self.spec, square=self.family.square)

    def _rows(self, lr_tiles: Tensor, sr_tiles: Tensor) -> int:
        visuals = shown_visuals(lr_tiles[:1].detach(), [sr_tiles[:1].detach()], self.spec)
        return self.rows_per_forward(next(iter(self.prompts.values())), visuals)

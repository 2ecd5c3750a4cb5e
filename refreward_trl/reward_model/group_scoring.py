"""The candidates of one LR image in one call: prompt and LR image run once, their keys and values are shared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.reward_model.preprocess import expected_rating
from refreward_trl.reward_model.question import JudgePrompt, shown_visuals

if TYPE_CHECKING:
    from refreward_trl.reward_model.scoring import RateJudge


def rate_with_shared_prefix(
    judge: RateJudge, lr_tiles: Float[Tensor, "t 3 h w"], sr_tiles: Float[Tensor, "k t 3 H W"]
) -> Float[Tensor, "k t"]:
    """Rates K candidates, cut into T tiles each, of the LR image with these tiles.

    Args:
        judge: A judge with layout `"images"`.
        lr_tiles: float pixels in [0, 1].
        sr_tiles: float pixels in [0, 1].
    """
    total = torch.zeros(sr_tiles.shape[:2], device=sr_tiles.device)
    for aspect, (_, weight) in judge.spec.rating_prompts.items():
        prompt = judge.prompts[aspect]
        columns = [
            _rate_tile(judge, prompt, lr_tiles[tile : tile + 1], sr_tiles[:, tile]) for tile in range(len(lr_tiles))
        ]
        total = total + weight * torch.stack(columns, dim=1)
    return total


def _rate_tile(judge: RateJudge, prompt: JudgePrompt, lr_tile: Tensor, sr_tiles: Tensor) -> Float[Tensor, " k"]:
    shown_lr, *_ = shown_visuals(lr_tile, [sr_tiles[:1]], judge.spec)
    split = prompt.shared_length((shown_lr.shape[-2], shown_lr.shape[-1]))
    with torch.no_grad():  # nothing of the LR image depends on the SR pixels
        first = _cut(judge.token_inputs(prompt, [shown_lr, sr_tiles[:1]]), slice(None, split))
        pixels = judge.family.pixel_inputs([shown_lr])
        cache = judge.model(**first, **pixels, use_cache=True, logits_to_keep=1).past_key_values
    ratings = []
    for part in sr_tiles.split(judge.rows_per_forward(prompt, [shown_lr, sr_tiles])):
        tokens = judge.token_inputs(prompt, [shown_lr.expand(len(part), -1, -1, -1), part])
        # The mask spans the shared tokens too.
        rest = _cut(tokens, slice(split, None)) | {"attention_mask": tokens["attention_mask"]}
        pixels = judge.family.pixel_inputs([part])
        output = judge.model(
            **rest, **pixels, past_key_values=_repeated(cache, len(part)), use_cache=True, logits_to_keep=1
        )
        logits = output.logits[:, -1, judge.rating_ids.to(output.logits.device)]
        ratings.append(expected_rating(logits, judge.spec))
    return torch.cat(ratings)


def _cut(inputs: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: value[..., part] for name, value in inputs.items()}


def _repeated(cache: Any, times: int) -> Any:
    """A copy of a key-value cache of one row with `times` rows; the original stays as it is."""
    from transformers import DynamicCache

    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys.expand(times, -1, -1, -1), layer.values.expand(times, -1, -1, -1), index)
    return copy

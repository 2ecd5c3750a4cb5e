"""The candidates of one LR image in one call: what they share runs once, and its keys and values are used again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.reward_model.preprocess import expected_rating
from refreward_trl.reward_model.question import JudgePrompt, shown_visuals

if TYPE_CHECKING:
    from refreward_trl.reward_model.comparing import CompareJudge
    from refreward_trl.reward_model.judge import MLLMJudge
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


def choose_with_shared_prefix(
    judge: CompareJudge, lr_tiles: Float[Tensor, "t 3 h w"], sr_tiles: Float[Tensor, "k t 3 H W"]
) -> Float[Tensor, "k k"]:
    """Returns the log odds that the candidate shown first is the better one, mean over tiles: row i is shown first,
    column j second; 0 on the diagonal. The LR image runs once, each first candidate once, for all that follow it.

    Args:
        judge: A judge with layout `"images"`.
        lr_tiles: float pixels in [0, 1].
        sr_tiles: float pixels in [0, 1].
    """
    tables = [_choose_tile(judge, lr_tiles[tile : tile + 1], sr_tiles[:, tile]) for tile in range(len(lr_tiles))]
    return torch.stack(tables).mean(dim=0)


def _rate_tile(judge: RateJudge, prompt: JudgePrompt, lr_tile: Tensor, sr_tiles: Tensor) -> Float[Tensor, " k"]:
    shown_lr, *_ = shown_visuals(lr_tile, [sr_tiles[:1]], judge.spec)
    split = prompt.shared_length(_size(shown_lr))
    with torch.no_grad():  # nothing of the LR image depends on the SR pixels
        tokens = judge.token_inputs(prompt, [shown_lr, sr_tiles[:1]])
        cache = _run(judge, tokens, slice(None, split), shown_lr).past_key_values
    ratings = []
    for part in sr_tiles.split(judge.rows_per_forward(prompt, [shown_lr, sr_tiles])):
        tokens = judge.token_inputs(prompt, [shown_lr.expand(len(part), -1, -1, -1), part])
        first_rows = torch.zeros(len(part), dtype=torch.long)
        logits = _run(judge, tokens, slice(split, None), part, _rows(cache, first_rows)).logits[:, -1]
        ratings.append(expected_rating(logits[:, judge.rating_ids.to(logits.device)], judge.spec))
    return torch.cat(ratings)


@torch.no_grad()
def _choose_tile(judge: CompareJudge, lr_tile: Tensor, tiles: Tensor) -> Float[Tensor, "k k"]:
    count, prompt = len(tiles), judge.prompt
    shown_lr, *_ = shown_visuals(lr_tile, [tiles[:1]] * 2, judge.spec)
    sizes = (_size(shown_lr), _size(tiles))
    ends = prompt.shared_length(sizes[0]), prompt.shared_length(*sizes)

    def tokens(rows: int) -> dict[str, Tensor]:
        return judge.token_inputs(
            prompt, [shown_lr.expand(rows, -1, -1, -1), *[tiles[:1].expand(rows, -1, -1, -1)] * 2]
        )

    seen_lr = _run(judge, tokens(1), slice(None, ends[0]), shown_lr).past_key_values
    table = torch.zeros(count, count, device=tiles.device)
    rows = judge.rows_per_forward(prompt, [shown_lr, tiles, tiles])
    first, second = (~torch.eye(count, dtype=torch.bool)).nonzero(as_tuple=True)
    for shown_first in torch.arange(count).split(rows):
        again = torch.zeros(len(shown_first), dtype=torch.long)
        middle = _run(judge, tokens(len(again)), slice(*ends), tiles[shown_first], _rows(seen_lr, again))
        wanted = torch.isin(first, shown_first)
        for part in wanted.nonzero().flatten().split(rows):
            cache = _rows(middle.past_key_values, first[part] - shown_first[0])
            last = _run(judge, tokens(len(part)), slice(ends[1], None), tiles[second[part]], cache)
            answers = last.logits[:, -1, judge.choice_ids.to(last.logits.device)].float()
            table[first[part], second[part]] = answers[:, 0] - answers[:, 1]
    return table


def _run(judge: MLLMJudge, tokens: dict[str, Tensor], part: slice, visual: Tensor, cache: Any = None) -> Any:
    """Runs a part of a row's tokens, which holds one visual, after those that the cache holds."""
    inputs = _cut(tokens, part)
    if cache is not None:
        # The mask spans the tokens in the cache too.
        inputs |= {"attention_mask": tokens["attention_mask"][..., : part.stop], "past_key_values": cache}
    return judge.model(**inputs, **judge.family.pixel_inputs([visual]), use_cache=True, logits_to_keep=1)


def _size(visual: Tensor) -> tuple[int, int]:
    return visual.shape[-2], visual.shape[-1]


def _cut(inputs: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: value[..., part] for name, value in inputs.items()}


def _rows(cache: Any, rows: Tensor) -> Any:
    """A copy of some rows of a key-value cache; the original stays as it is."""
    from transformers import DynamicCache

    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        pair = [
            states.expand(len(rows), -1, -1, -1) if len(states) == 1 else states[rows.to(states.device)]
            for states in (layer.keys, layer.values)
        ]
        copy.update(*pair, index)
    return copy

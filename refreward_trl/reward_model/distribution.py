"""How a judge's answers about one image are spread, and how sure that makes it of an order."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.reward_model.answers import parse_rating
from refreward_trl.reward_model.preprocess import split_tiles
from refreward_trl.reward_model.reasoning import ReasonJudge
from refreward_trl.reward_model.scoring import RateJudge

FLOOR = 1e-3
"""Standard deviation that is always there, in units of the rating: two equal answers say "equal", not "certain"."""


class Spread(NamedTuple):
    """Mean and standard deviation of what a judge answers about an image; NaN if no answer could be read."""

    mean: float
    std: float


@torch.no_grad()
def score_spread(
    judge: RateJudge | ReasonJudge, lr_image: Float[Tensor, "3 h w"], sr_image: Float[Tensor, "3 H W"]
) -> Spread:
    """Returns the spread of a judge's ratings of one image.

    A judge that rates has it in the probabilities of its rating tokens, averaged over tiles (and over aspects, by
    their weights); one that reasons in its samples.

    Args:
        judge: The judge; a reasoning one should draw several samples.
        lr_image: float pixels in [0, 1].
        sr_image: float pixels in [0, 1], a whole multiple of the LR size.
    """
    if isinstance(judge, ReasonJudge):
        (said,) = judge.reason(lr_image[None], sr_image[None])
        low, high = judge.spec.rating_range
        ratings = [rating for text in said.answers if not math.isnan(rating := parse_rating(text, low, high))]
        if not ratings:
            return Spread(math.nan, math.nan)
        values = torch.tensor(ratings, dtype=torch.float64)
        return Spread(float(values.mean()), float(values.std(unbiased=False)))
    device = judge.device
    lr_tiles, sr_tiles, _ = split_tiles(
        lr_image[None].to(device), sr_image[None].to(device), judge.spec, square=judge.family.square
    )
    values = torch.tensor(judge.spec.rating_values, dtype=torch.float64)
    shares = torch.zeros(len(values), dtype=torch.float64)
    for aspect, (_, weight) in judge.spec.rating_prompts.items():
        parts = zip(lr_tiles.split(judge.batch_size), sr_tiles.split(judge.batch_size), strict=True)
        logits = torch.cat([judge.rating_logits(*part, aspect=aspect) for part in parts])
        shares += weight * logits.double().softmax(dim=-1).mean(dim=0).cpu()
    mean = float(shares @ values)
    return Spread(mean, math.sqrt(max(0.0, float(shares @ values.square()) - mean**2)))


def probability_better(first: Spread, second: Spread) -> float:
    """Returns how likely the first image is better, if both scores are normal (Thurstone's case III).

    NaN if one of them has no score.
    """
    spread = math.sqrt(first.std**2 + second.std**2 + FLOOR**2)
    return 0.5 * (1 + math.erf((first.mean - second.mean) / spread / math.sqrt(2)))

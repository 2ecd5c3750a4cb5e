"""Asking a judge for reasons and a rating: text is generated and parsed, and what cannot be parsed is no score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.randomness import stateless_seed
from refreward_trl.reward_model.answers import parse_rating
from refreward_trl.reward_model.judge import SPEC_FILE, MLLMJudge
from refreward_trl.reward_model.preprocess import split_tiles
from refreward_trl.reward_model.question import JudgePrompt, shown_visuals
from refreward_trl.reward_model.spec import JudgeSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ReasonedRating:
    """What a judge said about one image.

    Attributes:
        rating: Mean of the parsed answers, tile by tile; NaN if some tile has none.
        answers: The texts, tile after tile, all samples of a tile together.
        unparsed: How many of them held no rating.
    """

    rating: float
    answers: tuple[str, ...]
    unparsed: int


class ReasonJudge(MLLMJudge):
    """A judge that thinks in words before it rates: `<think>..</think><answer>..</answer>`; not differentiable.

    Args:
        model: See `MLLMJudge`.
        tokenizer: See `MLLMJudge`.
        spec: A spec with `reason_prompt`.
        num_samples: Answers per tile; their mean is the rating.
        temperature: Of sampling; 0 takes the most likely token, then one sample is all there is.
        seed: Of the samples: the same call gives the same answers whatever ran before it, on the same machine.
        **limits: See `MLLMJudge`.

    Raises:
        CheckpointError: The spec has no `reason_prompt`.
        ConfigError: Several samples without temperature, or numbers out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: JudgeSpec,
        *,
        num_samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        **limits: Any,
    ) -> None:
        super().__init__(model, tokenizer, spec, **limits)
        if not spec.reason_prompt:
            raise CheckpointError(
                f"the judge {spec.name!r} was not made to reason: it has no reason_prompt",
                where=SPEC_FILE,
                fix="ask it to rate, or give a spec with reason_prompt",
            )
        if num_samples < 1 or temperature < 0 or (num_samples > 1 and temperature == 0):
            raise ConfigError(
                f"num_samples {num_samples} at temperature {temperature}",
                where="ReasonJudge",
                fix="several samples need a temperature above 0",
            )
        self.num_samples = num_samples
        self.temperature = temperature
        self.seed = seed
        visuals = 1 if spec.layout == "clip" else 2
        self.prompt = JudgePrompt(tokenizer, self.family, spec.reason_prompt, visuals=visuals)

    @torch.no_grad()
    def reason(self, lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]) -> list[ReasonedRating]:
        """Returns what the judge says about each image, tile by tile.

        Args:
            lr_image: float pixels in [0, 1].
            sr_image: float pixels in [0, 1], a whole multiple of the LR size.

        Raises:
            DataError: Sizes that do not fit each other.
        """
        device = self.device
        lr_tiles, sr_tiles, count = split_tiles(
            lr_image.to(device), sr_image.to(device), self.spec, square=self.family.square
        )
        visuals = shown_visuals(lr_tiles[:1], [sr_tiles[:1]], self.spec)
        rows = max(1, self.rows_per_forward(self.prompt, visuals) // self.num_samples)
        texts: list[str] = []
        for index, (lr_part, sr_part) in enumerate(zip(lr_tiles.split(rows), sr_tiles.split(rows), strict=True)):
            visuals = shown_visuals(lr_part, [sr_part], self.spec)
            texts.extend(
                self.write(
                    self.prompt,
                    visuals,
                    num_samples=self.num_samples,
                    temperature=self.temperature,
                    seed=stateless_seed(self.seed, "reason", index),
                )
            )
        per_image = count * self.num_samples
        return [self._read(texts[start : start + per_image]) for start in range(0, len(texts), per_image)]

    def rate(self, lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
        """Returns the ratings alone, NaN where there is none; see `reason`."""
        ratings = [answer.rating for answer in self.reason(lr_image, sr_image)]
        return torch.tensor(ratings, dtype=torch.float32, device=sr_image.device)

    def _read(self, texts: list[str]) -> ReasonedRating:
        ratings = [parse_rating(text, *self.spec.rating_range) for text in texts]
        tiles = [ratings[start : start + self.num_samples] for start in range(0, len(ratings), self.num_samples)]
        means = [_mean_of_parsed(tile) for tile in tiles]
        unparsed = sum(math.isnan(rating) for rating in ratings)
        return ReasonedRating(sum(means) / len(means), tuple(texts), unparsed)


def _mean_of_parsed(ratings: list[float]) -> float:
    parsed = [rating for rating in ratings if not math.isnan(rating)]
    return sum(parsed) / len(parsed) if parsed else math.nan

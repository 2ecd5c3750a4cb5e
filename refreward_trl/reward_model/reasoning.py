"""Asking a judge for reasons before it rates or chooses: what it writes is parsed, and the unreadable is no score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.randomness import stateless_seed
from refreward_trl.reward_model.answers import parse_choice, parse_rating
from refreward_trl.reward_model.judge import SPEC_FILE, MLLMJudge
from refreward_trl.reward_model.preprocess import check_same_size, split_tiles
from refreward_trl.reward_model.question import JudgePrompt, check_layout, shown_visuals
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


class ReasoningJudge(MLLMJudge):
    """What both ways to reason share: `<think>..</think><answer>..</answer>`, sampled tile by tile; no gradient.

    Args:
        model: See `MLLMJudge`.
        tokenizer: See `MLLMJudge`.
        spec: A spec with the prompt that is asked.
        num_samples: Answers per tile; their mean counts.
        temperature: Of sampling; 0 takes the most likely token, then one sample is all there is.
        seed: Of the samples: the same call gives the same answers whatever ran before it, on the same machine.
        **limits: See `MLLMJudge`.

    Raises:
        CheckpointError: The spec has no such prompt, or the layout "clip" where two candidates are shown.
        ConfigError: Several samples without temperature, or numbers out of range.
    """

    prompt_field: ClassVar[Literal["reason_prompt", "reason_compare_prompt"]]
    candidates: ClassVar[int]
    """How many a question shows."""

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
        text = getattr(spec, self.prompt_field)
        if not text:
            purpose = "reason" if self.candidates == 1 else "reason about two candidates"
            raise CheckpointError(
                f"the judge {spec.name!r} was not made to {purpose}: it has no {self.prompt_field}",
                where=SPEC_FILE,
                fix=f"ask it to rate, or give a spec with {self.prompt_field}",
            )
        if num_samples < 1 or temperature < 0 or (num_samples > 1 and temperature == 0):
            raise ConfigError(
                f"num_samples {num_samples} at temperature {temperature}",
                where=type(self).__name__,
                fix="several samples need a temperature above 0",
            )
        self.num_samples = num_samples
        self.temperature = temperature
        self.seed = seed
        if self.candidates > 1:
            check_layout(spec)
        visuals = 1 if spec.layout == "clip" else 1 + self.candidates
        self.prompt = JudgePrompt(tokenizer, self.family, text, visuals=visuals)

    def _tiles(self, lr_image: Tensor, sr_image: Tensor) -> tuple[Tensor, Tensor, int]:
        device = self.device
        return split_tiles(lr_image.to(device), sr_image.to(device), self.spec, square=self.family.square)

    def _ask(self, lr_tiles: Tensor, shown: Sequence[Tensor], *, seed_of: str) -> list[str]:
        """Returns what the judge writes about each tile, all samples of a tile together."""
        visuals = shown_visuals(lr_tiles[:1], [tiles[:1] for tiles in shown], self.spec)
        rows = max(1, self.rows_per_forward(self.prompt, visuals) // self.num_samples)
        texts: list[str] = []
        for index, (lr_part, *parts) in enumerate(
            zip(lr_tiles.split(rows), *(tiles.split(rows) for tiles in shown), strict=True)
        ):
            texts.extend(
                self.write(
                    self.prompt,
                    shown_visuals(lr_part, parts, self.spec),
                    num_samples=self.num_samples,
                    temperature=self.temperature,
                    seed=stateless_seed(self.seed, seed_of, index),
                )
            )
        return texts

    def _mean_over_tiles(self, values: Sequence[float]) -> float:
        """Returns the mean over tiles of the means over their samples that were read; NaN if some tile has none."""
        tiles = [values[start : start + self.num_samples] for start in range(0, len(values), self.num_samples)]
        means = [_mean_of_parsed(tile) for tile in tiles]
        return sum(means) / len(means)


class ReasonJudge(ReasoningJudge):
    """A judge that thinks in words before it rates. See `ReasoningJudge` for the arguments."""

    prompt_field = "reason_prompt"
    candidates = 1

    @torch.no_grad()
    def reason(self, lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]) -> list[ReasonedRating]:
        """Returns what the judge says about each image, tile by tile.

        Args:
            lr_image: float pixels in [0, 1].
            sr_image: float pixels in [0, 1], a whole multiple of the LR size.

        Raises:
            DataError: Sizes that do not fit each other.
        """
        lr_tiles, sr_tiles, count = self._tiles(lr_image, sr_image)
        texts = self._ask(lr_tiles, [sr_tiles], seed_of="reason")
        per_image = count * self.num_samples
        return [self._read(texts[start : start + per_image]) for start in range(0, len(texts), per_image)]

    def rate(self, lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
        """Returns the ratings alone, NaN where there is none; see `reason`."""
        ratings = [answer.rating for answer in self.reason(lr_image, sr_image)]
        return torch.tensor(ratings, dtype=torch.float32, device=sr_image.device)

    def _read(self, texts: list[str]) -> ReasonedRating:
        ratings = [parse_rating(text, *self.spec.rating_range) for text in texts]
        unparsed = sum(math.isnan(rating) for rating in ratings)
        return ReasonedRating(self._mean_over_tiles(ratings), tuple(texts), unparsed)


class ReasonCompareJudge(ReasoningJudge):
    """A judge that thinks in words before it chooses one of two candidates. See `ReasoningJudge` for the arguments."""

    prompt_field = "reason_compare_prompt"
    candidates = 2

    def compare(
        self,
        lr_image: Float[Tensor, "b 3 h w"],
        first: Float[Tensor, "b 3 H W"],
        second: Float[Tensor, "b 3 H W"],
    ) -> Float[Tensor, " b"]:
        """Returns how much rather `first` is chosen, in [-1, 1], the mean over both orders; NaN if one has no answer.

        `compare(lr, a, b) == -compare(lr, b, a)`: both orders are asked, with the same seeds.

        Raises:
            DataError: Sizes that do not fit each other.
        """
        forward, backward = self.compare_orders(lr_image, first, second)
        return (forward - backward) / 2

    @torch.no_grad()
    def compare_orders(
        self,
        lr_image: Float[Tensor, "b 3 h w"],
        first: Float[Tensor, "b 3 H W"],
        second: Float[Tensor, "b 3 H W"],
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Returns how much rather the candidate shown first is chosen than the other one, in [-1, 1]: with `first`
        shown first, and with `second` shown first. 1 and -1 where all answers agree, NaN where a tile has none.

        Raises:
            DataError: Sizes that do not fit each other.
        """
        check_same_size(first, second)
        lr_tiles, first_tiles, count = self._tiles(lr_image, first)
        second_tiles = self._tiles(lr_image, second)[1]
        per_image = count * self.num_samples
        found = []
        for shown in ([first_tiles, second_tiles], [second_tiles, first_tiles]):
            choices = [self._choice(text) for text in self._ask(lr_tiles, shown, seed_of="reason_compare")]
            means = [
                self._mean_over_tiles(choices[start : start + per_image])
                for start in range(0, len(choices), per_image)
            ]
            found.append(torch.tensor(means, dtype=torch.float32, device=first.device))
        return found[0], found[1]

    def _choice(self, text: str) -> float:
        chosen = parse_choice(text, self.spec.choice_tokens)
        return math.nan if chosen is None else 1.0 if chosen == self.spec.choice_tokens[0] else -1.0


def _mean_of_parsed(ratings: Sequence[float]) -> float:
    parsed = [rating for rating in ratings if not math.isnan(rating)]
    return sum(parsed) / len(parsed) if parsed else math.nan

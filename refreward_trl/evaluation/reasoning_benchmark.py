"""How well a judge's written answers rank candidates: the rewards it is trained on, on groups it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from refreward_trl.data.images import from_pil, to_float
from refreward_trl.evaluation.statistics import Estimate, estimate
from refreward_trl.randomness import stateless_seed
from refreward_trl.reward_model.judge import MLLMJudge
from refreward_trl.reward_model.question import JudgePrompt

Reward = Callable[..., Sequence[float | None]]


@runtime_checkable
class Rows(Protocol):
    """Questions that are made when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class GroupRewards:
    """Mean rewards of the answers about each group.

    Attributes:
        total: `(groups,)`, the weighted sum; NaN where nothing could be scored.
        each: Every reward's mean by name `(groups,)`.
        photos: Photo of each group, the cluster for intervals.
    """

    total: NDArray[np.float64]
    each: Mapping[str, NDArray[np.float64]]
    photos: tuple[str, ...]

    def summary(self) -> dict[str, float]:
        """Returns the means over groups, `reward` being the weighted sum."""
        return {"reward": _mean(self.total), **{name: _mean(values) for name, values in self.each.items()}}


def gains(before: GroupRewards, after: GroupRewards, *, seed: int = 0) -> dict[str, Estimate]:
    """Returns how much each reward, and `reward`, their weighted sum, rose on the same groups.

    With 95 % intervals resampled by photo.
    """
    rises = {"reward": after.total - before.total}
    rises |= {name: values - before.each[name] for name, values in after.each.items()}
    return {name: estimate(rise, before.photos, seed=seed) for name, rise in rises.items()}


def reward_answers(
    judge: MLLMJudge,
    rows: Rows,
    rewards: Sequence[Reward],
    weights: Sequence[float],
    *,
    block: int,
    num_samples: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> GroupRewards:
    """Asks a judge every question of some groups, several times, and rewards the answers as in training.

    Args:
        judge: The judge; any way to ask, since only its network and spec are used.
        rows: As `trainers.reasoning_rows.ReasoningRows` makes them, `block` of each group.
        rewards: TRL rewards with names.
        weights: One per reward.
        block: Rows of a group.
        num_samples: Answers to each question.
        temperature: Of sampling.
        seed: Of the answers; the same questions are answered with the same draws by every judge.
        watch: Wraps the numbers of the groups, for a progress bar.
    """
    prompt: JudgePrompt | None = None
    found: list[dict[str, float]] = []
    photos: list[str] = []
    for number in watch(range(len(rows) // block)):
        group = [rows[number * block + place] for place in range(block)]
        if prompt is None:
            text = group[0]["prompt"][0]["content"]
            prompt = JudgePrompt(judge.tokenizer, judge.family, text, visuals=len(group[0]["images"]))
        images = ([to_float(from_pil(image, where="images")) for image in row["images"]] for row in group)
        visuals = [torch.stack(side).to(judge.device) for side in zip(*images, strict=True)]
        draws = stateless_seed(seed, "answers", number)
        texts = judge.write(prompt, visuals, num_samples=num_samples, temperature=temperature, seed=draws)
        found.append(_means(group, texts, rewards, num_samples))
        photos.append(str(group[0]["photo"]))
    names = [reward.__name__ for reward in rewards]  # type: ignore[attr-defined]
    each = {name: np.array([means[name] for means in found]) for name in names}
    total = sum(weight * each[name] for name, weight in zip(names, weights, strict=True))
    return GroupRewards(np.asarray(total, dtype=np.float64), each, tuple(photos))


def _means(
    group: Sequence[Mapping[str, Any]], texts: Sequence[str], rewards: Sequence[Reward], num_samples: int
) -> dict[str, float]:
    repeated = [row for row in group for _ in range(num_samples)]
    columns = {name: [row[name] for row in repeated] for name in group[0]}
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    prompts = columns.pop("prompt")
    means = {}
    for reward in rewards:
        values = reward(prompts=prompts, completions=completions, completion_ids=None, **columns)
        known = [value for value in values if value is not None and not math.isnan(value)]
        means[reward.__name__] = sum(known) / len(known) if known else math.nan  # type: ignore[attr-defined]
    return means


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan

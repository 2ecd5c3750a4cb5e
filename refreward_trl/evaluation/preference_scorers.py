"""What can be asked which of two candidates is better: judges in each of their ways, rewards, and formulas.

All answer with margins: positive where the first candidate of a pair is held to be better, NaN where there is no
answer. A margin has the scorer's own unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from refreward_trl.data.images import to_float
from refreward_trl.data.preferences import OrderedPair, PreferenceGroup
from refreward_trl.errors import ConfigError, RewardError
from refreward_trl.evaluation.metrics import Metric, Sample
from refreward_trl.evaluation.protocols import HR, NOTHING
from refreward_trl.evaluation.reward_benchmark import Score
from refreward_trl.reward_model.comparing import CompareJudge
from refreward_trl.reward_model.reasoning import ReasonCompareJudge
from refreward_trl.rewards import score_all
from refreward_trl.types import RewardFunction, stack_if_equal

PAIRS_AT_ONCE = 16
"""Pairs whose pixels are copied for one call of a comparing judge."""

Sees: TypeAlias = Literal["SR", "SR and LR", "SR and HR", "no image"]


class Reply(NamedTuple):
    """What a scorer says about the pairs of one group.

    Attributes:
        margins: One per pair.
        scores: Score of each candidate in a pair; empty where candidates have none of their own.
        agrees: One per pair: 1 where the answer is the same in both orders, 0 where it is not; empty where candidates
            are scored one at a time.
    """

    margins: list[float]
    scores: Mapping[int, float]
    agrees: list[float]


class Scorer(ABC):
    """Something that orders candidates.

    Attributes:
        name: What it is called in tables.
        sees: Which images its answers can depend on.
        facts: What it is: its source, how it is asked, digests of its question and weights.
        problem: Why answers were missing, as far as it is known.
    """

    def __init__(self, name: str, *, sees: Sees = "SR and LR", facts: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.sees: Sees = sees
        self.facts = dict(facts or {})
        self.problem = ""

    @abstractmethod
    def reply(self, group: PreferenceGroup, pairs: Sequence[OrderedPair]) -> Reply:
        """Says which of the candidates of each pair is better; looks at no label."""


class PointScorer(Scorer):
    """A scorer that looks at one candidate at a time: a margin is the difference of two scores, so the order in which
    it is asked about them cannot matter."""

    @abstractmethod
    def scores(self, group: PreferenceGroup, wanted: Sequence[int]) -> list[float]:
        """Returns the score of each candidate in `wanted`, NaN where there is none; higher is better."""

    def reply(self, group: PreferenceGroup, pairs: Sequence[OrderedPair]) -> Reply:
        wanted = sorted({index for pair in pairs for index in (pair.better, pair.worse)})
        scores = dict(zip(wanted, self.scores(group, wanted), strict=True))
        return Reply([scores[pair.better] - scores[pair.worse] for pair in pairs], scores, [])


class RewardScorer(PointScorer):
    """A reward of the package's contract; a judge that rates is one."""

    def __init__(self, name: str, reward: RewardFunction, facts: Mapping[str, str]) -> None:
        super().__init__(name, facts=facts)
        self.reward = reward

    def scores(self, group: PreferenceGroup, wanted: Sequence[int]) -> list[float]:
        columns: dict[str, Any] = {"sample_id": [group.sample_id] * len(wanted)}
        if group.hr_image is not None:
            columns["hr_image"] = [to_float(group.hr_image)] * len(wanted)
        with torch.no_grad():
            table = score_all(
                [self.reward],
                [self.name],
                None,
                completions=stack_if_equal([to_float(group.candidates[index]) for index in wanted]),
                lr_image=[to_float(group.lr_image)] * len(wanted),
                columns=columns,
            )
        return table.per_reward[self.name].tolist()


class CompareScorer(Scorer):
    """A judge that is shown two candidates at once, in both orders; candidates of unlike sizes get no answer.

    One that reasons gives no answer either where it names no choice, in one order or the other.
    """

    def __init__(self, name: str, judge: CompareJudge | ReasonCompareJudge, facts: Mapping[str, str]) -> None:
        super().__init__(name, facts=facts)
        self.judge = judge

    @torch.no_grad()
    def reply(self, group: PreferenceGroup, pairs: Sequence[OrderedPair]) -> Reply:
        margins, agrees = [nan] * len(pairs), [nan] * len(pairs)
        sizes = [image.shape for image in group.candidates]
        comparable = [place for place, pair in enumerate(pairs) if sizes[pair.better] == sizes[pair.worse]]
        if len(comparable) < len(pairs):
            self.problem = "candidates of unlike sizes are not compared"
        for places in _same_size(comparable, [sizes[pair.better] for pair in pairs]):
            sides = [[pairs[place].better for place in places], [pairs[place].worse for place in places]]
            first, second = (to_float(torch.stack([group.candidates[index] for index in side])) for side in sides)
            lr_image = to_float(group.lr_image).expand(len(places), -1, -1, -1)
            forward, backward = self.judge.compare_orders(lr_image, first, second)
            if not isinstance(self.judge, ReasonCompareJudge):
                _check_finite(self.name, forward, backward)
            for place, ahead, behind in zip(places, forward.tolist(), backward.tolist(), strict=True):
                margins[place] = (ahead - behind) / 2
                if isnan(margins[place]):
                    self.problem = "an answer names no choice"
                    continue
                agrees[place] = float(_sign(ahead) == -_sign(behind))
        return Reply(margins, {}, agrees)


class FormulaScorer(PointScorer):
    """A formula of LR and SR image."""

    def __init__(self, name: str, formula: Score, *, sees: Sees) -> None:
        super().__init__(name, sees=sees, facts={"formula": (formula.__doc__ or name).strip()})
        self.formula = formula

    @torch.no_grad()
    def scores(self, group: PreferenceGroup, wanted: Sequence[int]) -> list[float]:
        lr_image = to_float(group.lr_image)[None]
        return [self.formula(lr_image, to_float(group.candidates[index])[None]).item() for index in wanted]


class MetricScorer(PointScorer):
    """A metric of single images, its sign turned where lower is better; no answer where it cannot be taken."""

    def __init__(self, metric: Metric, device: torch.device | str) -> None:
        against: dict[str, Sees] = {HR: "SR and HR", NOTHING: "SR"}
        sees = against.get(metric.protocol.against, "SR and LR")
        super().__init__(metric.name, sees=sees, facts={"protocol": metric.protocol.text})
        if metric.better == "neither":
            raise ConfigError(
                f"{metric.name} orders nothing: neither direction is better",
                where="--metrics",
                fix="name a metric with a better direction",
            )
        self.metric = metric
        self.device = torch.device(device)

    def scores(self, group: PreferenceGroup, wanted: Sequence[int]) -> list[float]:
        return [self._score(group, index) for index in wanted]

    def _score(self, group: PreferenceGroup, index: int) -> float:
        image, hr_image = group.candidates[index], group.hr_image
        if self.metric.needs_hr and hr_image is None:
            self.problem = "no HR images"
            return nan
        if hr_image is not None and self.metric.needs_hr and hr_image.shape != image.shape:
            self.problem = "HR images of other sizes than the candidates"
            return nan
        if min(image.shape[-2:]) < self.metric.min_side:
            self.problem = f"images under {self.metric.min_side} pixels"
            return nan
        try:
            value = self.metric.measure(self._sample(group, image, hr_image))
        except RewardError as error:
            if self.metric.protocol.judge:
                raise
            # A formula has no value for some images, and none is no score.
            self.problem = error.what
            return nan
        return value if self.metric.better == "higher" else -value

    def _sample(self, group: PreferenceGroup, image: Tensor, hr_image: Tensor | None) -> Sample:
        lr_image, sr_image = (to_float(each)[None].to(self.device) for each in (group.lr_image, image))
        hr = None if hr_image is None else to_float(hr_image)[None].to(self.device)
        return Sample(group.sample_id, lr_image, sr_image, hr)


def _same_size(places: Sequence[int], sizes: Sequence[torch.Size]) -> list[list[int]]:
    by_size: dict[torch.Size, list[int]] = {}
    for place in places:
        by_size.setdefault(sizes[place], []).append(place)
    return [
        members[start : start + PAIRS_AT_ONCE]
        for members in by_size.values()
        for start in range(0, len(members), PAIRS_AT_ONCE)
    ]


def _check_finite(name: str, *answers: Tensor) -> None:
    if not all(bool(answer.isfinite().all()) for answer in answers):
        raise RewardError(
            "the judge gave an answer that is not finite",
            where=f"model {name!r}",
            fix="check its weights; if it runs in float16, use bfloat16 or float32",
        )


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)

"""Rewards under TRL's contract for a judge that is trained by GRPO: its written answers against known preferences.

They read the columns that `trainers.reasoning_rows` writes. `completions` are texts or conversations, and every group
(the rows of one LR image) must be whole in the batch that a process scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from refreward_trl.errors import ConfigError, RewardError
from refreward_trl.objectives.ranking_rewards import pointwise_rewards, swap_agreement
from refreward_trl.rewards.adapters import completion_text


class AnswerFormat:
    """1 for one thought followed by one answer, else 0."""

    __name__ = "format"

    def __call__(self, *, completions: Any, **columns: Any) -> list[float]:
        from refreward_trl.reward_model.answers import has_format

        return [float(has_format(completion_text(completion))) for completion in completions]


class CorrectChoice:
    """1 for naming the better candidate, 0.5 for either of two that are tied, 0 for the other one and for no answer.

    Args:
        tokens: The names of the two candidates, as in `JudgeSpec.choice_tokens`.
    """

    __name__ = "correct"

    def __init__(self, tokens: Sequence[str] = ("A", "B")) -> None:
        self.tokens = _two(tokens)

    def __call__(
        self,
        *,
        completions: Any,
        truth: Sequence[float],
        log_metric: Callable[[str, float], Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Scores choices; `truth` is 1 where the first candidate shown is better, 0.5 for a tie, 0 for the second."""
        places = _choices(completions, self.tokens)
        _log_unread(log_metric, [place is None for place in places])
        return [
            0.0 if place is None else float(known if place == 0 else 1 - known)
            for place, known in zip(places, truth, strict=True)
        ]


class SwapConsistency:
    """The share of the answers to the same question in the other order that name the same candidate.

    A judge that always says "A" gets 0, and one that knows what it sees gets 1, right or wrong: it belongs beside
    `CorrectChoice`.

    Args:
        tokens: See `CorrectChoice`.
    """

    __name__ = "swap_consistency"

    def __init__(self, tokens: Sequence[str] = ("A", "B")) -> None:
        self.tokens = _two(tokens)

    def __call__(
        self, *, completions: Any, group: Sequence[str], shown: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        """Scores choices.

        Args:
            completions: The answers.
            group: Names the pair that a question is about.
            shown: The candidates in the order of the question.
            **columns: Ignored.

        Raises:
            RewardError: A question without its swapped one in the batch.
        """
        named = [
            None if place is None else order[place]
            for place, order in zip(_choices(completions, self.tokens), shown, strict=True)
        ]
        answers: dict[tuple[str, tuple[int, ...]], list[int | None]] = {}
        for pair, order, choice in zip(group, shown, named, strict=True):
            answers.setdefault((pair, tuple(order)), []).append(choice)
        rewards = []
        for pair, order, choice in zip(group, shown, named, strict=True):
            swapped = answers.get((pair, tuple(reversed(order))))
            if swapped is None:
                raise _missing_mates(self.__name__, pair, "the swapped question is not in the batch")
            rewards.append(swap_agreement(choice, swapped))
        return rewards


class RankingFidelity:
    """VisualQuality-R1's reward: a rating is compared with those of the other candidates of its LR image.

    See `objectives.ranking_rewards.pointwise_rewards` for the formula.

    Args:
        low: The lowest rating.
        high: The highest.
    """

    __name__ = "ranking"

    def __init__(self, low: float = 1.0, high: float = 5.0) -> None:
        if not low < high:
            raise ConfigError(f"ratings from {low} to {high}", where="reward 'ranking'")
        self.low, self.high = low, high

    def __call__(
        self,
        *,
        completions: Any,
        group: Sequence[str],
        candidate: Sequence[int],
        mates: Sequence[int],
        truths: Sequence[str],
        log_metric: Callable[[str, float], Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Scores ratings.

        Args:
            completions: The answers.
            group: Names the LR image and visit that a question belongs to.
            candidate: Number of the candidate that it is about.
            mates: How many candidates the group has.
            truths: JSON `[[i, j, truth], ...]` of the group.
            log_metric: As in TRL.
            **columns: Ignored.

        Raises:
            RewardError: A candidate of a group is not in the batch.
        """
        from refreward_trl.reward_model.answers import parse_rating

        ratings = [parse_rating(completion_text(text), self.low, self.high) for text in completions]
        _log_unread(log_metric, [math.isnan(rating) for rating in ratings])
        rewards: list[float | None] = [None] * len(ratings)
        for name, rows in _rows_by(group).items():
            places: dict[int, list[int]] = {}
            for row in rows:
                places.setdefault(candidate[row], []).append(row)
            if len(places) != mates[rows[0]]:
                raise _missing_mates(
                    self.__name__, name, f"{len(places)} of its {mates[rows[0]]} candidates are in the batch"
                )
            order = sorted(places)
            known = {(order.index(i), order.index(j)): truth for i, j, truth in json.loads(truths[rows[0]])}
            scored = pointwise_rewards([[ratings[row] for row in places[number]] for number in order], known)
            for number, values in zip(order, scored, strict=True):
                for row, value in zip(places[number], values, strict=True):
                    rewards[row] = value
        return rewards


def _choices(completions: Iterable[Any], tokens: Sequence[str]) -> list[int | None]:
    from refreward_trl.reward_model.answers import parse_choice

    names = [parse_choice(completion_text(completion), tokens) for completion in completions]
    return [None if name is None else tokens.index(name) for name in names]


def _rows_by(group: Sequence[str]) -> Mapping[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(group):
        rows.setdefault(name, []).append(row)
    return rows


def _log_unread(log_metric: Callable[[str, float], Any] | None, unread: Sequence[bool]) -> None:
    if log_metric is not None:
        log_metric("unreadable_answers", sum(unread) / max(1, len(unread)))


def _two(tokens: Sequence[str]) -> tuple[str, str]:
    if len(tokens) != 2 or tokens[0] == tokens[1]:
        raise ConfigError(f"{list(tokens)} are not two different answers", where="tokens")
    return tokens[0], tokens[1]


def _missing_mates(reward: str, group: str, what: str) -> RewardError:
    return RewardError(
        f"{what}: the group {group!r} is spread over batches or ranks",
        where=f"reward {reward!r}",
        fix="train with JudgeGRPOTrainer, or keep shuffle_dataset off and give every batch whole groups",
    )

"""Asks scorers about every labelled pair, and again with a wrong and with a blank LR image.

One group is in memory at a time. A scorer never sees a label, a generator or an artefact; and all that follows from
its answers is computed afterwards (`preference_results`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import TypeAlias

import numpy as np
import torch.nn.functional as F
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from refreward_trl.data.image_sources import ImageSource
from refreward_trl.data.images import to_float, to_uint8
from refreward_trl.data.preferences import PreferenceGroup, PreferenceRecord
from refreward_trl.errors import DataError
from refreward_trl.evaluation.preference_pairs import PairTable
from refreward_trl.evaluation.preference_scorers import Reply, Scorer
from refreward_trl.randomness import stateless_seed

Floats = NDArray[np.float64]
Progress: TypeAlias = Callable[[Sequence[PreferenceRecord], str], Iterable[PreferenceRecord]]
"""Wraps the groups to go through, with the name of what is asked."""


@dataclass(frozen=True)
class Answers:
    """What a scorer said about the N pairs of a table; NaN where it said nothing.

    Attributes:
        margins: `(N,)`, positive where it agrees with the label.
        scores: `(N, 2)` scores of the better and the worse one; NaN where candidates have none of their own.
        agrees: `(N,)` 1 where the answer does not depend on the order of the candidates, else 0; None for a scorer of
            one candidate at a time.
        shuffled: `(N,)` margins beside the LR image of another photo; None where the LR image is never looked at.
        blanked: `(N,)` margins beside an LR image of one colour, the mean of the true one; None likewise.
        problem: Why answers are missing, if it is known.
    """

    margins: Floats
    scores: Floats
    agrees: Floats | None = None
    shuffled: Floats | None = None
    blanked: Floats | None = None
    problem: str = ""

    @property
    def missing(self) -> int:
        """Number of pairs without an answer."""
        return int(np.isnan(self.margins).sum())


def ask(
    scorers: Sequence[Scorer],
    table: PairTable,
    *,
    label: str,
    seed: int = 0,
    progress: Progress = lambda records, _: records,
) -> dict[str, Answers]:
    """Returns the answers of each scorer by name.

    Args:
        scorers: Asked group by group, so that each image is decoded once for all of them.
        table: What they are asked about.
        label: What the progress is called.
        seed: Chooses the wrong LR images.
        progress: Wraps the groups.

    Raises:
        DataError: An image cannot be read.
        RewardError: A scorer raised, or answered with something that is no number.
    """
    sheets = {scorer.name: _Sheet(scorer, len(table)) for scorer in scorers}
    foreign = foreign_lr_images(table.records, seed)
    for record in progress(table.records, label):
        group = record.load(table.aspect)
        rows = table.groups[record.sample_id]
        source = foreign[record.sample_id]
        other = None if source is None else resized(source.read(), group.lr_image)
        for scorer in scorers:
            sheets[scorer.name].enter(rows, group, other, table)
    return {name: sheet.answers() for name, sheet in sheets.items()}


def foreign_lr_images(records: Sequence[PreferenceRecord], seed: int) -> dict[str, ImageSource | None]:
    """Returns for each group the LR image of another photo, of the same size if there is one; None if there is none.

    The choice depends on the seed, the group and the set of groups, and not on their order.
    """
    ordered = sorted(records, key=lambda record: record.sample_id)
    by_size: dict[tuple[int, int], list[PreferenceRecord]] = {}
    for record in ordered:
        by_size.setdefault(record.lr_image.size(), []).append(record)
    found: dict[str, ImageSource | None] = {}
    for record in ordered:
        start = stateless_seed(seed, "foreign lr_image", record.sample_id)
        pools = (by_size[record.lr_image.size()], ordered)
        others = (other for pool in pools for other in _from(pool, start) if other.photo != record.photo)
        chosen = next(others, None)
        found[record.sample_id] = None if chosen is None else chosen.lr_image
    return found


def _from(pool: Sequence[PreferenceRecord], start: int) -> Iterable[PreferenceRecord]:
    return (pool[(start + step) % len(pool)] for step in range(len(pool)))


def resized(image: UInt8[Tensor, "3 _ _"], like: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 h w"]:
    """Returns an image in the size of another one: itself, or bicubic with anti-aliasing."""
    if image.shape == like.shape:
        return image
    size = (like.shape[-2], like.shape[-1])
    return to_uint8(F.interpolate(to_float(image)[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1))


def blank(lr_image: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 h w"]:
    """Returns an image of one colour, the mean of the given one."""
    mean = lr_image.float().mean(dim=(1, 2), keepdim=True)
    return mean.round().to(lr_image.dtype).expand_as(lr_image).contiguous()


class _Sheet:
    """The answers of one scorer as they come in."""

    def __init__(self, scorer: Scorer, count: int) -> None:
        self.scorer = scorer
        self.margins, self.shuffled, self.blanked, self.agrees = (np.full(count, nan) for _ in range(4))
        self.scores = np.full((count, 2), nan)
        self.is_pairwise = False

    def enter(self, rows: slice, group: PreferenceGroup, other: Tensor | None, table: PairTable) -> None:
        pairs = [labelled.pair for labelled in table.pairs[rows]]

        def reply(lr_image: Tensor) -> Reply:
            given = self.scorer.reply(replace(group, lr_image=lr_image), pairs)
            if len(given.margins) != len(pairs):
                raise DataError(
                    f"{len(given.margins)} answers for {len(pairs)} pairs", where=f"scorer {self.scorer.name!r}"
                )
            return given

        own = reply(group.lr_image)
        self.margins[rows] = own.margins
        if own.scores:
            self.scores[rows] = [(own.scores[pair.better], own.scores[pair.worse]) for pair in pairs]
        if own.agrees:
            self.is_pairwise = True
            self.agrees[rows] = own.agrees
        if self.scorer.sees == "SR and LR":
            self.blanked[rows] = reply(blank(group.lr_image)).margins
            if other is not None:
                self.shuffled[rows] = reply(other).margins

    def answers(self) -> Answers:
        reads_lr = self.scorer.sees == "SR and LR"
        return Answers(
            margins=self.margins,
            scores=self.scores,
            agrees=self.agrees if self.is_pairwise else None,
            shuffled=self.shuffled if reads_lr else None,
            blanked=self.blanked if reads_lr else None,
            problem=self.scorer.problem,
        )


def from_margins(margins: Floats, problem: str = "") -> Answers:
    """Returns the answers of a scorer that never looks at an image."""
    return Answers(margins, np.full((len(margins), 2), nan), problem=problem)

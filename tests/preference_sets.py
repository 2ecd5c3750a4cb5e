"""Small labelled groups whose right answer can be read off the pixels: the better candidate is the brighter one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from refreward_trl.data.image_sources import ImageTensor
from refreward_trl.data.preferences import Candidate, OrderedPair, PreferenceGroup, PreferenceRecord
from refreward_trl.evaluation.preference_scorers import FormulaScorer, Scorer

LR_SIDE, SIDE = 8, 16
STEP = 15
"""Grey levels between candidates of neighbouring ranks; LR images are as bright as the best candidate."""


def noisy(level: int, side: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (level + torch.randint(-4, 5, (3, side, side), generator=generator)).clamp(0, 255).to(torch.uint8)


def group(
    number: int,
    ranks: Sequence[int | None] = (0, 1, 2),
    *,
    photo: str | None = None,
    generators: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    with_hr: bool = True,
    side: int = SIDE,
    **fields: Any,
) -> PreferenceRecord:
    """Group `number`, of a photo of its own unless told, and as bright as no other: LR images tell photos apart."""
    best = 100 + 37 * number % 150
    levels = [best - STEP * (len(ranks) if rank is None else rank) for rank in ranks]
    sample_id = f"p{number:03d}@0"
    candidates = tuple(
        Candidate(
            ImageTensor(noisy(level, side, 100 * number + place)),
            generators[place] if generators else "",
            kinds[place] if kinds else "",
        )
        for place, level in enumerate(levels)
    )
    hr_image = ImageTensor(noisy(best, side, 100 * number + 99)) if with_hr else None
    record = PreferenceRecord(
        sample_id=sample_id,
        photo=photo or f"p{number:03d}",
        lr_image=ImageTensor(noisy(best, side * LR_SIDE // SIDE, 100 * number + 50)),
        candidates=candidates,
        ranks={"overall": tuple(ranks)},
        source="constructed",
        hr_image=hr_image,
    )
    return replace(record, **fields)


def brightness(lr_image: Tensor, sr_image: Tensor) -> Tensor:
    """Mean of the SR image."""
    return sr_image.mean(dim=(1, 2, 3))


def likeness(lr_image: Tensor, sr_image: Tensor) -> Tensor:
    """How near the SR image's brightness is to the LR image's."""
    return -(sr_image.mean(dim=(1, 2, 3)) - lr_image.mean(dim=(1, 2, 3))).abs()


def scorer(formula: Callable[[Tensor, Tensor], Tensor] = brightness, name: str = "mine") -> FormulaScorer:
    """A scorer that is asked with other LR images too."""
    return FormulaScorer(name, formula, sees="SR and LR")


def guess(lr_image: Tensor, sr_image: Tensor) -> Tensor:
    """A number that depends on every pixel and means nothing."""
    sums = [round(float(image.double().sum()) * 1e6) for image in sr_image]
    return torch.cat([torch.rand(1, generator=torch.Generator().manual_seed(value)) for value in sums])


class Refusing(Scorer):
    """A scorer that answers only about groups of these numbers."""

    def __init__(self, name: str, answered: Sequence[int]) -> None:
        super().__init__(name)
        self.answered = answered
        self.inner = scorer()

    def reply(self, group: PreferenceGroup, pairs: Sequence[OrderedPair]) -> Any:
        given = self.inner.reply(group, pairs)
        if int(group.sample_id[1:4]) in self.answered:
            return given
        self.problem = "it did not want to"
        return given._replace(margins=[float("nan")] * len(pairs), scores=dict.fromkeys(given.scores, float("nan")))

"""Candidate groups made to learn or to ask people from: which candidates, which of them are worth comparing, and what
is known about their order.

Nothing here knows a generator or a reward: SR images come in as pixels, scores as functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Generator, Tensor

from refreward_trl.data.candidates import ARTEFACTS, JUDGE_KINDS, apply_artefact, severity_pair
from refreward_trl.data.images import to_float, to_uint8
from refreward_trl.data.preference_records import PreferenceChoice
from refreward_trl.errors import ConfigError
from refreward_trl.randomness import stateless_generator

Score = Callable[[Tensor, Tensor, Tensor | None], float]
"""LR image, SR image, HR image if there is one, uint8 `(3, ., .)` -> a number, higher is better; NaN is not scored."""

HR = "hr"
UNLABELLED, CONSTRUCTED = "none", "constructed"


@dataclass
class BuildArguments:
    """What `refreward data build` makes, of what, and how it is labelled."""

    output_dir: str = field(default="", metadata={"help": "a new folder for the preference dataset"})
    format: Literal["imagefolder", "parquet"] = field(
        default="imagefolder", metadata={"help": "metadata.jsonl and image files, or parquet that holds the images"}
    )
    seed: int = field(default=0, metadata={"help": "of crops, degradations, artefacts and the choice of candidates"})
    dataset: str = field(
        default="default",
        metadata={"help": "shipped photos (default), or a folder of HR images; lr:FOLDER is one of LR images"},
    )
    dataset_split: str | None = field(default=None, metadata={"help": "split of the photos; null takes train"})
    degradation: Literal["realesrgan", "seesr", "stablesr", "bicubic"] = field(
        default="seesr", metadata={"help": "what makes the LR images where there are none"}
    )
    scale: int = field(default=4, metadata={"help": "HR size over LR size"})
    crop_size: int | None = field(
        default=128, metadata={"help": "side of the crops in HR pixels; null takes whole photos"}
    )
    crops_per_image: int = field(default=1, metadata={"help": "different crops of each photo"})
    methods: list[str] = field(
        default_factory=lambda: ["bicubic", "default"],
        metadata={
            "help": "[LABEL=]SOURCE of SR methods or folders of their images: bicubic, default, a generator, "
            "package.module:attribute, spandrel:FILE, or a folder"
        },
    )
    include_hr: bool = field(default=True, metadata={"help": "let the HR image be a candidate, too"})
    artefacts: list[str] = field(
        default_factory=lambda: list(JUDGE_KINDS), metadata={"help": "artefacts to put on images; [] puts none"}
    )
    artefacts_per_group: int = field(
        default=1, metadata={"help": "how many of them each group gets, each mild and severe"}
    )
    artefacts_on: Literal["hr", "method"] = field(
        default=HR, metadata={"help": "what they are put on: the HR image, or a drawn method's SR image"}
    )
    candidates_per_group: int = field(default=4, metadata={"help": "candidates that are chosen of all that are made"})
    choose: Literal["random", "different", "contested"] = field(
        default="random",
        metadata={"help": "by lot, those whose pixels differ most, or those that contested_by disagree on"},
    )
    contested_by: list[str] = field(
        default_factory=lambda: ["lr_consistency", "gradient_energy"],
        metadata={"help": "the two metrics whose disagreement counts"},
    )
    min_difference: float = field(
        default=1.0, metadata={"help": "candidates closer than this (RMSE in 8-bit levels) count as one"}
    )
    label: str = field(
        default=CONSTRUCTED,
        metadata={"help": "the known order (constructed), a metric such as psnr_y, or none, to ask people"},
    )
    tie_margin: float = field(default=0.0, metadata={"help": "metric values that are no further apart are a tie"})


def check_build_arguments(settings: BuildArguments, *, has_hr: bool) -> None:
    """Raises `ConfigError` if the settings cannot make a group."""
    if unknown := [kind for kind in settings.artefacts if kind not in ARTEFACTS]:
        raise ConfigError(
            f"unknown artefact {unknown[0]!r}", where="artefacts", fix=f"one of {', '.join(sorted(ARTEFACTS))}"
        )
    if settings.label == "human":
        raise ConfigError(
            "only people label as people do", where="label", fix="set label: none, and let people choose"
        )
    on_hr = bool(settings.artefacts) and settings.artefacts_on == HR
    for key, needs_hr in {"include_hr": settings.include_hr, "artefacts_on": on_hr}.items():
        if needs_hr and not has_hr:
            raise ConfigError(
                "there are no HR images",
                where=key,
                fix="name HR photos, or set include_hr: false and artefacts_on: method",
            )
    if settings.artefacts and settings.artefacts_on == "method" and not settings.methods:
        raise ConfigError("there is no method whose images get artefacts", where="artefacts_on", fix="add one, or hr")
    if settings.choose == "contested" and len(settings.contested_by) != 2:
        raise ConfigError(f"{len(settings.contested_by)} metrics", where="contested_by", fix="name two")
    artefacts = min(settings.artefacts_per_group, len(settings.artefacts))
    if settings.label == CONSTRUCTED and not artefacts and not settings.include_hr:
        raise ConfigError(
            "no order is known: there are only images of different methods",
            where="label",
            fix="add artefacts or include_hr: true, or label by a metric or by none",
        )
    made = len(settings.methods) + settings.include_hr + 2 * artefacts
    if made < settings.candidates_per_group:
        raise ConfigError(
            f"{made} candidates are made, {settings.candidates_per_group} are to be chosen",
            where="candidates_per_group",
            fix=f"use at most {made}, or more methods or artefacts",
        )


@dataclass(frozen=True)
class Sample:
    """What a group is made of.

    Attributes:
        sample_id: Key of the group.
        lr_image: uint8 `(3, h, w)`.
        hr_image: uint8 `(3, H, W)`, if there is one.
        sr_images: Label of a method -> its image, uint8 `(3, H, W)`.
        other: Another photo, whose texture an artefact may borrow if it has the same size.
    """

    sample_id: str
    lr_image: UInt8[Tensor, "3 h w"]
    hr_image: UInt8[Tensor, "3 H W"] | None
    sr_images: Mapping[str, Tensor]
    other: UInt8[Tensor, "3 _ _"] | None = None


@dataclass(frozen=True)
class Made:
    """A candidate: its pixels, the method that made it, and the artefact on it."""

    image: UInt8[Tensor, "3 H W"]
    generator: str
    kind: str = ""


@dataclass(frozen=True)
class BuiltGroup:
    """A group: its candidates, and their order as ranks (by a metric) or as choices (known by construction)."""

    candidates: tuple[Made, ...]
    ranks: tuple[int | None, ...] = ()
    choices: tuple[PreferenceChoice, ...] = ()


def build_group(
    sample: Sample, settings: BuildArguments, *, score: Score | None = None, rivals: Sequence[Score] = ()
) -> BuiltGroup | None:
    """Makes a group of a sample, a pure function of both and the seed.

    Args:
        sample: The images.
        settings: Checked by `check_build_arguments`.
        score: The metric that labels, if one does.
        rivals: The two metrics of `choose: contested`.

    Returns:
        The group; None if too few candidates differ, or none of their pairs is worth comparing, or the label orders
        no two.
    """
    draws = stateless_generator(settings.seed, "preference_build", sample.sample_id)
    made, known = make_candidates(sample, settings, draws)
    kept = distinct(made, settings.min_difference)
    if len(kept) < 2:
        return None
    weights = _pair_weights([made[number] for number in kept], sample, settings, rivals, draws)
    if settings.label == CONSTRUCTED:
        is_known = [[(a, b) in known or (b, a) in known for b in kept] for a in kept]
        weights = weights * torch.tensor(is_known)
    chosen = [kept[number] for number in choose_candidates(weights, settings.candidates_per_group)]
    if len(chosen) < 2:
        return None
    # Where a candidate stands must tell nothing about it.
    chosen = [chosen[number] for number in torch.randperm(len(chosen), generator=draws).tolist()]
    candidates = tuple(made[number] for number in chosen)
    if settings.label == UNLABELLED:
        return BuiltGroup(candidates)
    if settings.label == CONSTRUCTED:
        place = {number: position for position, number in enumerate(chosen)}
        pairs = sorted((place[better], place[worse]) for better, worse in known if better in place and worse in place)
        return BuiltGroup(candidates, choices=tuple(PreferenceChoice(*pair, "first") for pair in pairs))
    assert score is not None
    values = [score(sample.lr_image, candidate.image, sample.hr_image) for candidate in candidates]
    ranks = rank_by(values, settings.tie_margin)
    return BuiltGroup(candidates, ranks) if len(set(ranks) - {None}) > 1 else None


def make_candidates(
    sample: Sample, settings: BuildArguments, draws: Generator
) -> tuple[list[Made], set[tuple[int, int]]]:
    """Returns all candidates of a sample, and the index pairs (better, worse) that are known because of how they are
    made: an image is better than with an artefact on it, a mild artefact better than a severe one of the same kind and
    the same draws, and the HR image better than everything else. (Of a method's image the first is an assumption: a
    slight blur may help one that is too sharp.)"""
    made = [Made(image, label) for label, image in sample.sr_images.items()]
    known: set[tuple[int, int]] = set()
    hr_number = len(made) if settings.include_hr and sample.hr_image is not None else None
    if hr_number is not None and sample.hr_image is not None:
        made.append(Made(sample.hr_image, HR))
    kinds = [settings.artefacts[n] for n in torch.randperm(len(settings.artefacts), generator=draws).tolist()]
    for kind in kinds[: settings.artefacts_per_group]:
        number, base = hr_number, sample.hr_image
        if settings.artefacts_on == "method" or base is None:
            number = int(torch.randint(len(sample.sr_images), (), generator=draws))
            base = made[number].image
        label = HR if base is sample.hr_image else made[number or 0].generator
        better = [] if number is None else [number]
        for image in _mild_and_severe(kind, base, sample.other, draws):
            made.append(Made(image, label, kind))
            known |= {(one, len(made) - 1) for one in better}
            better.append(len(made) - 1)
    if hr_number is not None:
        known |= {(hr_number, other) for other in range(len(made)) if other != hr_number}
    return made, known


def _mild_and_severe(kind: str, base: Tensor, other: Tensor | None, draws: Generator) -> list[Tensor]:
    seed = int(torch.randint(2**31, (), generator=draws))
    texture = None if other is None or other.shape != base.shape else to_float(other)
    return [
        to_uint8(
            apply_artefact(
                kind, to_float(base), severity, generator=torch.Generator().manual_seed(seed), other=texture
            )
        )
        for severity in severity_pair(draws)
    ]


def distinct(made: Sequence[Made], least: float) -> list[int]:
    """Returns the candidates that are no further copies of an earlier one: the root mean square of the differences is
    at least `least` 8-bit levels, and they are not equal."""
    kept: list[int] = []
    for number, one in enumerate(made):
        distances = [rms_difference(one.image, made[earlier].image) for earlier in kept]
        if all(distance > 0 and distance >= least for distance in distances):
            kept.append(number)
    return kept


def rms_difference(first: UInt8[Tensor, "3 H W"], second: UInt8[Tensor, "3 H W"]) -> float:
    """Returns the root mean square of the differences of two images, in 8-bit levels."""
    return float((first.float() - second.float()).square().mean().sqrt())


def _pair_weights(
    made: Sequence[Made], sample: Sample, settings: BuildArguments, rivals: Sequence[Score], draws: Generator
) -> Float[Tensor, "m m"]:
    """Returns how much each two candidates are worth comparing; 0 is not at all."""
    count = len(made)
    if settings.choose == "different":
        return torch.tensor([[rms_difference(a.image, b.image) for b in made] for a in made])
    if settings.choose == "contested":
        values = [[score(sample.lr_image, one.image, sample.hr_image) for one in made] for score in rivals]
        return disagreement(*values)
    drawn = torch.rand(count, count, generator=draws).clamp(min=1e-3)
    return (drawn + drawn.T) * (1 - torch.eye(count))


def disagreement(first: Sequence[float], second: Sequence[float]) -> Float[Tensor, "m m"]:
    """Returns how far apart two scores put each two candidates in opposite directions: the product of the differences
    of their ranks, 0 where they agree or one of them did not score."""
    ranks = [
        torch.tensor([math.nan if rank is None else float(rank) for rank in rank_by(values)])
        for values in (first, second)
    ]
    one, two = (rank[:, None] - rank[None] for rank in ranks)
    return (-one * two).clamp(min=0).nan_to_num(0.0)


def choose_candidates(weights: Float[Tensor, "m m"], count: int) -> list[int]:
    """Chooses at most `count` candidates that are most worth comparing: the best pair, then again and again whichever
    adds most to the sum of the weights. Candidates that add nothing are left out; so there may be none.

    Args:
        weights: Symmetric, not negative, 0 on the diagonal.
        count: At least 2.
    """
    if not len(weights) or float(weights.max()) <= 0:
        return []
    chosen = list(divmod(int(weights.argmax()), len(weights)))
    while len(chosen) < count:
        gains = weights[chosen].sum(0)
        gains[chosen] = 0
        if float(gains.max()) <= 0:
            break
        chosen.append(int(gains.argmax()))
    return sorted(chosen)


def rank_by(values: Sequence[float], tie_margin: float = 0.0) -> tuple[int | None, ...]:
    """Ranks values, the highest 1; one that is no further than `tie_margin` below the next higher one shares its rank.
    What was not scored (NaN) has no rank."""
    order = sorted((n for n, value in enumerate(values) if not math.isnan(value)), key=lambda n: -values[n])
    ranks: list[int | None] = [None] * len(values)
    rank = 1
    for position, number in enumerate(order):
        if position and values[order[position - 1]] - values[number] > tie_margin:
            rank += 1
        ranks[number] = rank
    return tuple(ranks)

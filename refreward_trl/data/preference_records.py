"""One preference group: the K candidates of one LR image, and what was said about which of them is better.

A `PreferenceRecord` reads no pixels; its `load` makes the `PreferenceGroup` that a judge is trained on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import UInt8
from torch import Tensor

from refreward_trl.data.image_sources import ImageSource
from refreward_trl.errors import ConfigError, DataError

ASPECTS = ("overall", "consistency", "naturalness")
"""What candidates are compared in: faithful to the LR image, natural to look at, or both together."""

Answer = Literal["first", "second", "tie"]
ANSWERS: tuple[str, ...] = get_args(Answer)

Size = tuple[int, int]


class OrderedPair(NamedTuple):
    """What is known about two candidates of a group.

    Attributes:
        better, worse: Indices into the candidates; of a tie the lower one comes first.
        weight: How much stands behind it: of an order the votes for it less those against it, of a tie the votes that
            decide nothing.
        tie: Whether neither is better.
    """

    better: int
    worse: int
    weight: float
    tie: bool


@dataclass(frozen=True)
class PreferenceChoice:
    """One answer of one annotator about two candidates of a group.

    Attributes:
        first, second: Indices into the candidates.
        preferred: "first", "second" or "tie".
        aspect: One of `ASPECTS`.
        annotator: Who answered; "" if unknown.
        weight: How much the answer counts.
    """

    first: int
    second: int
    preferred: Answer
    aspect: str = "overall"
    annotator: str = ""
    weight: float = 1.0

    @property
    def pair(self) -> tuple[int, int]:
        """The two candidates, the lower index first."""
        return min(self.first, self.second), max(self.first, self.second)

    @property
    def better(self) -> int | None:
        """The candidate that is preferred; None for a tie."""
        return {"first": self.first, "second": self.second, "tie": None}[self.preferred]


@dataclass(frozen=True)
class Candidate:
    """One super-resolved image of a group.

    Attributes:
        image: Where it is read from.
        generator: The method that made it; "" if unknown, "hr" for the ground truth.
        kind: The artefact that was put on it, if any was.
    """

    image: ImageSource
    generator: str = ""
    kind: str = ""


@dataclass(frozen=True)
class PreferenceGroup:
    """The candidates of one LR image with a partial order known by construction or given by a named source.

    Attributes:
        sample_id: Group key, `"<photo>@<draw>"`.
        photo: Name of the photo; the cluster for confidence intervals and for splits.
        lr_image: uint8 `(3, h, w)`.
        candidates: uint8 `(K, 3, H, W)`, or K images `(3, H, W)` where their sizes differ.
        better_worse: Index pairs `(better, worse)` into `candidates`.
        kinds: How each candidate was made.
        source: Where the order comes from: `"constructed"`, or the name of a metric. Human only if people were asked.
        ties: Index pairs of candidates that are equally good.
        weights: One for each of `better_worse`; none means that all count the same.
        tie_weights: One for each of `ties`; none means that all count the same.
        generators: The method that made each candidate; none if unknown.
        hr_image: uint8 `(3, H, W)`, if there is one.
    """

    sample_id: str
    photo: str
    lr_image: UInt8[Tensor, "3 h w"]
    candidates: UInt8[Tensor, "k 3 H W"] | tuple[Tensor, ...]
    better_worse: tuple[tuple[int, int], ...]
    kinds: tuple[str, ...]
    source: str = "constructed"
    ties: tuple[tuple[int, int], ...] = ()
    weights: tuple[float, ...] = ()
    tie_weights: tuple[float, ...] = ()
    generators: tuple[str, ...] = ()
    hr_image: UInt8[Tensor, "3 _ _"] | None = None

    def as_row(self) -> dict[str, Any]:
        """Returns the dataset row that `RefRewardTrainer` collates.

        Raises:
            DataError: The candidates have different sizes, and cannot be stacked.
        """
        if not isinstance(self.candidates, Tensor):
            sizes = ", ".join(f"{image.shape[2]}x{image.shape[1]}" for image in self.candidates)
            raise DataError(
                f"the candidates have different sizes ({sizes}), and a batch needs one",
                where=f"sample {self.sample_id}",
                fix="bring them to one size, or leave the group out",
            )
        return {
            "sample_id": self.sample_id,
            "lr_image": self.lr_image,
            "candidates": self.candidates,
            "better_worse": _as_indices(self.better_worse),
            "kinds": list(self.kinds),
            "ties": _as_indices(self.ties),
            "weights": torch.tensor(self.weights or (1.0,) * len(self.better_worse)),
            "tie_weights": torch.tensor(self.tie_weights or (1.0,) * len(self.ties)),
        }


def _as_indices(pairs: Sequence[tuple[int, int]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


@dataclass(frozen=True)
class PreferenceRecord:
    """One group as it is stored: images not read yet, answers not merged yet.

    Attributes:
        sample_id: Group key, unique in a dataset.
        photo: Name of the photo, the cluster for splits and confidence intervals.
        lr_image: Where the LR image is read from.
        candidates: At least two.
        ranks: Aspect -> rank of each candidate: lower is better, equal is a tie, None is not ranked.
        choices: Answers about two candidates each.
        source: Where the order comes from: "human", "constructed", or the name of the metric that gave it.
        hr_image: Where the ground truth is read from, if there is one.
        degradation: What made the LR image.
        split: The split that the group belongs to; "" if there are none.
    """

    sample_id: str
    photo: str
    lr_image: ImageSource
    candidates: tuple[Candidate, ...]
    ranks: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    choices: tuple[PreferenceChoice, ...] = ()
    source: str = "unknown"
    hr_image: ImageSource | None = None
    degradation: str = ""
    split: str = ""

    @property
    def aspects(self) -> tuple[str, ...]:
        """The aspects that anything is known about."""
        return tuple(aspect for aspect in ASPECTS if self.pairs(aspect))

    def pairs(self, aspect: str = "overall") -> list[OrderedPair]:
        """Merges ranks and choices into at most one statement about any two candidates, in the order of the indices.

        Each choice votes with its weight, the ranks with weight 1. What has most votes wins: the one, the other, or a
        tie; where two have equally many, it is a tie. An order weighs the votes for it less those for its opposite.

        Raises:
            ConfigError: There is no such aspect.
        """
        if aspect not in ASPECTS:
            raise ConfigError(f"there is no aspect {aspect!r}", where="aspect", fix=f"one of {', '.join(ASPECTS)}")
        votes: dict[tuple[int, int], dict[str, list[float]]] = {}
        for first, second, preferred, weight in self._votes(aspect):
            if second < first:
                first, second, preferred = second, first, _OPPOSITE[preferred]
            votes.setdefault((first, second), {answer: [] for answer in ANSWERS})[preferred].append(weight)
        return [_merge(first, second, votes[first, second]) for first, second in sorted(votes)]

    def _votes(self, aspect: str) -> Iterator[tuple[int, int, str, float]]:
        for (first, a), (second, b) in itertools.combinations(enumerate(self.ranks.get(aspect, ())), 2):
            if a is not None and b is not None:
                yield first, second, "tie" if a == b else "first" if a < b else "second", 1.0
        for choice in self.choices:
            if choice.aspect == aspect:
                yield choice.first, choice.second, choice.preferred, choice.weight

    def load(self, aspect: str = "overall") -> PreferenceGroup:
        """Decodes the images.

        Args:
            aspect: The one whose order the group gets.

        Raises:
            DataError: An image is missing or damaged, or of a size that does not fit the LR image.
        """
        lr_image = self.lr_image.read()
        images = [candidate.image.read() for candidate in self.candidates]
        hr_image = None if self.hr_image is None else self.hr_image.read()
        sizes = [_size(image) for image in images]
        for problem in size_problems(self, _size(lr_image), sizes, None if hr_image is None else _size(hr_image)):
            raise problem
        pairs = self.pairs(aspect)
        orders, ties = ([pair for pair in pairs if pair.tie is tied] for tied in (False, True))
        return PreferenceGroup(
            sample_id=self.sample_id,
            photo=self.photo,
            lr_image=lr_image,
            candidates=torch.stack(images) if len(set(sizes)) == 1 else tuple(images),
            better_worse=tuple((pair.better, pair.worse) for pair in orders),
            kinds=tuple(candidate.kind for candidate in self.candidates),
            source=self.source,
            ties=tuple((pair.better, pair.worse) for pair in ties),
            weights=tuple(pair.weight for pair in orders),
            tie_weights=tuple(pair.weight for pair in ties),
            generators=tuple(candidate.generator for candidate in self.candidates),
            hr_image=hr_image,
        )


_OPPOSITE = {"first": "second", "second": "first", "tie": "tie"}


def _merge(first: int, second: int, votes: Mapping[str, Sequence[float]]) -> OrderedPair:
    ahead, behind, tied = (math.fsum(votes[answer]) for answer in ANSWERS)
    margin, most = abs(ahead - behind), max(ahead, behind)
    if math.isclose(ahead, behind) or math.isclose(most, tied) or tied > most:
        return OrderedPair(first, second, ahead + behind + tied - margin, True)
    return OrderedPair(first, second, margin, False) if ahead > behind else OrderedPair(second, first, margin, False)


def size_problems(
    record: PreferenceRecord, lr_image: Size, candidates: Sequence[Size | None], hr_image: Size | None
) -> Iterator[DataError]:
    """Yields what is wrong with the sizes (height, width) of a group: an SR or HR image must be a whole multiple of
    its LR image, the same in both directions. A size that is None is left out."""
    sources = [(f"candidate {n}", candidate.image) for n, candidate in enumerate(record.candidates)]
    sized = list(zip(sources, candidates, strict=True))
    if record.hr_image is not None:
        sized.append((("the HR image", record.hr_image), hr_image))
    height, width = lr_image
    for (name, source), size in sized:
        if size is None or (size[0] % height == 0 and size[1] * height == width * size[0]):
            continue
        smaller = size[0] < height or size[1] < width
        relation = "smaller than" if smaller else "no whole multiple of"
        yield DataError(
            f"{name} has {size[1]}x{size[0]} pixels, {relation} its LR image of {width}x{height}",
            where=source.where,
            fix="pair each SR image with the LR image that it was made from",
        )


def _size(image: Tensor) -> Size:
    return int(image.shape[-2]), int(image.shape[-1])

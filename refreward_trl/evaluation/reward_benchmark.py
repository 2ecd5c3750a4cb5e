"""Judges on pairs of known order: accuracy per question, beside what needs no judge at all.

A judge is any callable `(lr_image, sr_image) -> (B,)`. Its accuracy on constructed pairs means little alone, because
consistency with the LR image solves many of them. So three baselines that need neither training nor the HR image stand
beside it, and the judge is asked again with another photo's LR image, where one that really reads it must fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from refreward_trl.data.images import to_float
from refreward_trl.data.preferences import PreferencePair
from refreward_trl.errors import DataError
from refreward_trl.evaluation.statistics import Estimate, estimate, pairwise_outcomes
from refreward_trl.randomness import stateless_seed
from refreward_trl.resampling import downscale, upscale
from refreward_trl.rewards.fidelity import image_psnr

Score: TypeAlias = Callable[[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 H W"]], Float[Tensor, " b"]]

PROJECTED = "projected_"
UNSEEN = "unseen_"


def consistency(lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
    """PSNR in dB of the reduced SR image to the LR image."""
    return image_psnr(downscale(sr_image, sr_image.shape[-1] // lr_image.shape[-1]), lr_image)


def likeness_to_upsampled(
    lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]
) -> Float[Tensor, " b"]:
    """PSNR in dB of the SR image to the bicubically enlarged LR image."""
    return image_psnr(sr_image, upscale(lr_image, sr_image.shape[-1] // lr_image.shape[-1]))


def laplacian_variance(lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
    """Variance of the Laplacian of the mean channel: sharpness alone, blind to the LR image."""
    kernel = sr_image.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    edges = F.conv2d(sr_image.mean(dim=1, keepdim=True), kernel[None, None])
    return edges.var(dim=(1, 2, 3))


BASELINES: Mapping[str, Score] = {
    "psnr_down_sr_to_lr": consistency,
    "psnr_to_upsampled_lr": likeness_to_upsampled,
    "laplacian_variance": laplacian_variance,
}
"""Scores that see no HR image and were never trained. A judge that does not beat them has learnt nothing of use."""


@dataclass(frozen=True)
class ColumnResult:
    """One scorer on the pairs of one column.

    Attributes:
        column: The question the pairs ask, see `data.candidates.EVALUATION_COLUMNS`.
        accuracy: Share of pairs in the known order with its 95 % interval, resampled by photo; a tie counts one half.
        outcomes: `(N,)` per pair 1, 0.5 or 0; NaN where the scorer gave no score.
        photos: Photo of each pair.
        kinds: Artefact of each pair.
    """

    column: str
    accuracy: Estimate
    outcomes: NDArray[np.float64]
    photos: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def missing(self) -> int:
        """Number of pairs without a score."""
        return int(np.isnan(self.outcomes).sum())


@dataclass(frozen=True)
class JudgeReport:
    """A judge on every column, the same with the wrong LR images, and the baselines.

    Attributes:
        own: The judge's results by column.
        shuffled: The judge's results by plain column, shown another photo's LR image.
        baselines: Results of `BASELINES` by name and column.
    """

    own: Mapping[str, ColumnResult]
    shuffled: Mapping[str, ColumnResult]
    baselines: Mapping[str, Mapping[str, ColumnResult]]

    def accuracy(self, columns: Callable[[Iterable[str]], list[str]], baseline: str | None = None) -> Estimate:
        """Accuracy over the columns that a filter such as `plain_columns` keeps, of the judge or of a baseline."""
        results = self.own if baseline is None else self.baselines[baseline]
        return pooled(results[name] for name in columns(self.own))

    def best_baseline(self, columns: Callable[[Iterable[str]], list[str]]) -> tuple[str, float]:
        """Name and accuracy of the strongest baseline over those columns."""
        accuracies = {name: self.accuracy(columns, name).mean for name in self.baselines}
        return max(accuracies.items(), key=lambda item: item[1])

    def summary(self) -> dict[str, Any]:
        """The block `judge` of `summary.json`. `pairs` counts all columns."""
        plain = self.accuracy(plain_columns)
        return {
            "pairs": sum(len(result.outcomes) for result in self.own.values()),
            "accuracy": plain.mean,
            "accuracy_ci95": [plain.low, plain.high],
            "accuracy_lr_shuffled": pooled(self.shuffled.values()).mean,
            "projected_accuracy": self.accuracy(projected_columns).mean,
            "unseen_accuracy": self.accuracy(unseen_columns).mean,
            "by_kind": {kind: accuracy for kind, (accuracy, _) in self.by_kind().items()},
            "baselines": {name: self.accuracy(plain_columns, name).mean for name in self.baselines},
            "projected_baselines": {name: self.accuracy(projected_columns, name).mean for name in self.baselines},
        }

    def by_kind(self) -> dict[str, tuple[float, int]]:
        """Accuracy and number of pairs of each artefact over the plain and unseen columns, worst first."""
        return by_kind(self.own[name] for name in [*plain_columns(self.own), *unseen_columns(self.own)])


def benchmark_judge(
    score: Score,
    pairs: Iterable[Sequence[PreferencePair]],
    *,
    batch_size: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
    watch: Callable[[ColumnResult], None] | None = None,
) -> JudgeReport:
    """Measures a judge and the baselines, column by column.

    Args:
        score: The judge.
        pairs: The pairs of one column after the other; may be built on demand.
        batch_size: Most images per call.
        seed: Seed of shuffles and intervals.
        device: Where the images are sent.
        watch: Called with the judge's result of each column as it is known.
    """
    own: dict[str, ColumnResult] = {}
    shuffled: dict[str, ColumnResult] = {}
    baselines: dict[str, dict[str, ColumnResult]] = {name: {} for name in BASELINES}
    run = partial(judge_column, batch_size=batch_size, seed=seed, device=device)
    for column in pairs:
        result = run(score, column)
        own[result.column] = result
        if plain_columns([result.column]):
            shuffled[result.column] = run(score, column, shuffle_lr=True)
        for name, baseline in BASELINES.items():
            baselines[name][result.column] = run(baseline, column)
        if watch is not None:
            watch(result)
    return JudgeReport(own, shuffled, baselines)


def judge_column(
    score: Score,
    pairs: Sequence[PreferencePair],
    *,
    shuffle_lr: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ColumnResult:
    """Scores both sides of every pair of one column.

    Args:
        score: The judge or baseline, without gradient, on float images in [0, 1].
        pairs: Pairs of one column and one image size.
        shuffle_lr: Show each pair the LR image of another photo's pair instead of its own.
        batch_size: Most images per call.
        seed: Seed of the shuffle and of the interval.
        device: Where the images are sent.

    Raises:
        DataError: There are no pairs, they come from several columns, or `score` returns the wrong number of scores.
    """
    columns = sorted({pair.column for pair in pairs})
    if len(columns) != 1:
        raise DataError(f"expected pairs of one column, got {columns or 'none'}", where="judge_column")
    lr_images = [pair.lr_image for pair in pairs]
    if shuffle_lr:
        lr_images = [lr_images[index] for index in foreign_partners([pair.photo for pair in pairs], seed)]
    better = _scores(score, lr_images, [pair.better for pair in pairs], batch_size, device)
    worse = _scores(score, lr_images, [pair.worse for pair in pairs], batch_size, device)
    return column_result(columns[0], pairwise_outcomes(better, worse), pairs, seed=seed)


def column_result(
    name: str, outcomes: NDArray[np.float64], pairs: Sequence[PreferencePair], *, seed: int = 0
) -> ColumnResult:
    """`ColumnResult` of known outcomes."""
    photos = tuple(pair.photo for pair in pairs)
    kinds = tuple(pair.kind for pair in pairs)
    return ColumnResult(name, estimate(outcomes, photos, seed=seed), outcomes, photos, kinds)


def pooled(results: Iterable[ColumnResult], *, seed: int = 0) -> Estimate:
    """Accuracy over all pairs of several columns, resampled by photo across them."""
    chosen = list(results)
    outcomes = np.concatenate([result.outcomes for result in chosen]) if chosen else np.empty(0)
    photos = [photo for result in chosen for photo in result.photos]
    return estimate(outcomes, photos, seed=seed)


def by_kind(results: Iterable[ColumnResult]) -> dict[str, tuple[float, int]]:
    """Accuracy and number of scored pairs of each artefact, worst first."""
    outcomes: dict[str, list[float]] = {}
    for result in results:
        for kind, outcome in zip(result.kinds, result.outcomes, strict=True):
            if not np.isnan(outcome):
                outcomes.setdefault(kind, []).append(float(outcome))
    table = {kind: (float(np.mean(values)), len(values)) for kind, values in outcomes.items()}
    return dict(sorted(table.items(), key=lambda item: item[1][0]))


def plain_columns(columns: Iterable[str]) -> list[str]:
    """Columns of artefacts seen in training, as made: neither back-projected nor of an unseen kind."""
    return [name for name in columns if not name.startswith((PROJECTED, UNSEEN))]


def unseen_columns(columns: Iterable[str]) -> list[str]:
    """Columns of the artefact kind that no judge was trained on, as made."""
    return [name for name in columns if name.startswith(UNSEEN)]


def projected_columns(columns: Iterable[str]) -> list[str]:
    """Back-projected columns: LR-consistency alone cannot answer them."""
    return [name for name in columns if name.startswith(PROJECTED)]


def foreign_partners(photos: Sequence[str], seed: int) -> list[int]:
    """For each pair the index of one of another photo, drawn evenly.

    Raises:
        DataError: All pairs come from one photo.
    """
    generator = np.random.default_rng(stateless_seed(seed, "foreign lr_image"))
    names = np.array(photos)
    partners = []
    for photo in photos:
        foreign = np.flatnonzero(names != photo)
        if len(foreign) == 0:
            raise DataError(
                f"all pairs come from the photo {photo!r}, so no other LR image can be shown",
                where="foreign_partners",
                fix="use at least two photos",
            )
        partners.append(int(generator.choice(foreign)))
    return partners


@torch.no_grad()
def _scores(
    score: Score, lr_images: Sequence[Tensor], sr_images: Sequence[Tensor], batch_size: int, device: torch.device | str
) -> NDArray[np.float64]:
    scores = []
    for start in range(0, len(sr_images), batch_size):
        rows = slice(start, start + batch_size)
        lr_batch = to_float(torch.stack(list(lr_images[rows])).to(device))
        sr_batch = to_float(torch.stack(list(sr_images[rows])).to(device))
        values = score(lr_batch, sr_batch)
        if values.shape != (len(sr_batch),):
            raise DataError(
                f"the scorer returned shape {tuple(values.shape)} for {len(sr_batch)} images",
                where="judge_column",
                fix="return one score per image",
            )
        scores.append(values.double().cpu().numpy())
    return np.concatenate(scores)

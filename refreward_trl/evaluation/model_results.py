"""What was measured of several models on the same images, how it is saved, and when two savings may be joined.

The file holds every figure of every image inside the protocol it was taken by. Means, intervals and win rates are
computed from those figures, when they are written and again when they are read, so a file is evidence, not a claim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from refreward_trl.errors import DataError
from refreward_trl.evaluation.metrics import Better, Kind
from refreward_trl.evaluation.protocols import Protocol, digest
from refreward_trl.evaluation.statistics import Estimate, estimate, pairwise_outcomes

FORMAT, FORMAT_VERSION = "refreward eval", 1
RESAMPLES = 2000


@dataclass(frozen=True)
class MeasuredImage:
    """An image of the set: its name, and digests of its pixels; `hr` is "" where there is no HR image."""

    sample_id: str
    lr: str
    hr: str = ""


@dataclass(frozen=True)
class MeasuredModel:
    """A model: what it is called, where it came from, and digests of its SR images in the order of the set."""

    label: str
    source: str
    sr: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """One metric of all models.

    Attributes:
        name: What it was asked for by.
        protocol: How it was taken.
        better: Which direction is better.
        kind: See `Metric`.
        unit: Of the numbers.
        digits: Decimals to show.
        values: By model, one number per image in the order of the set; NaN where not scored.
    """

    name: str
    protocol: Protocol
    better: Better
    kind: Kind
    unit: str
    digits: int
    values: Mapping[str, Sequence[float]]

    @property
    def sign(self) -> float:
        """1 or -1: the factor that makes higher better; NaN where neither is."""
        return {"higher": 1.0, "lower": -1.0, "neither": nan}[self.better]


@dataclass(frozen=True)
class Evaluation:
    """Models on one set of images.

    Attributes:
        images: The set, in order.
        models: The models; the first is the baseline.
        figures: What was measured, each with its own protocol.
        seed: Of the bootstrap.
        facts: What else decides the figures: seeds, degradation, device, versions.
        left_out: Metrics that could not be joined, and why.
    """

    images: Sequence[MeasuredImage]
    models: Sequence[MeasuredModel]
    figures: Sequence[Figure]
    seed: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)
    left_out: Sequence[str] = ()

    @property
    def baseline(self) -> str:
        """The first model, which the others are compared with."""
        return self.models[0].label

    @property
    def labels(self) -> list[str]:
        """All models."""
        return [model.label for model in self.models]

    @property
    def image_set(self) -> str:
        """Digest of all names and pixels of the set."""
        return digest(json.dumps([asdict(image) for image in self.images]).encode())

    def mean(self, figure: Figure, label: str) -> Estimate:
        """A model's mean over the images it was scored on, with its 95 % interval."""
        return self._estimate(figure.values[label])

    def difference(self, figure: Figure, label: str) -> Estimate:
        """Mean of the model's figure minus the baseline's on the same image, with its 95 % interval."""
        return self._estimate(self.changes(figure, label))

    def win_rate(self, figure: Figure, label: str) -> Estimate:
        """Share of images where the model is better than the baseline (a tie is half); NaN where nothing is better."""
        mine, theirs = (
            figure.sign * np.array(figure.values[each], dtype=np.float64) for each in (label, self.baseline)
        )
        return self._estimate(pairwise_outcomes(mine, theirs))

    def changes(self, figure: Figure, label: str) -> NDArray[np.float64]:
        """The model's figure minus the baseline's, image by image."""
        mine, theirs = (np.array(figure.values[each], dtype=np.float64) for each in (label, self.baseline))
        return mine - theirs

    def spread(self, figure: Figure) -> float:
        """Standard deviation of the baseline's figure over the images: the unit of an effect. NaN below two images."""
        values = np.array(figure.values[self.baseline], dtype=np.float64)
        values = values[~np.isnan(values)]
        return float(values.std(ddof=1)) if len(values) > 1 else nan

    def _estimate(self, values: Any) -> Estimate:
        return estimate(values, [image.sample_id for image in self.images], n=RESAMPLES, seed=self.seed)

    def as_dict(self) -> dict[str, Any]:
        """What is written to `eval.json`."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "image_set": self.image_set,
            "baseline": self.baseline,
            "bootstrap": {"seed": self.seed, "resamples": RESAMPLES, "clusters": "images", "level": 0.95},
            "facts": dict(self.facts),
            "left_out": list(self.left_out),
            "metrics": [self._figure_as_dict(figure) for figure in self.figures],
            "models": [asdict(model) for model in self.models],
            "images": [asdict(image) for image in self.images],
        }

    def _figure_as_dict(self, figure: Figure) -> dict[str, Any]:
        models = {}
        for label in self.labels:
            models[label] = {"mean": self.mean(figure, label).as_dict()}
            if label != self.baseline:
                models[label]["minus_baseline"] = self.difference(figure, label).as_dict()
                models[label]["win_rate"] = self.win_rate(figure, label).as_dict()
            models[label]["values"] = list(figure.values[label])
        about = {name: getattr(figure, name) for name in ("name", "better", "kind", "unit", "digits")}
        return {**about, "protocol": figure.protocol.as_dict(), "models": models}


def read_evaluation(path: Path) -> Evaluation:
    """Reads an `eval.json`; what was computed from its figures is computed again.

    Raises:
        DataError: The file is missing, is none, or contradicts itself.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"cannot be read: {error}", where=str(path), fix="name the eval.json of an evaluation"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError("this is no evaluation", where=str(path), fix="name an eval.json that refreward eval wrote")
    if content.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"format_version is {content.get('format_version')!r}, this version reads {FORMAT_VERSION}",
            where=str(path),
            fix="measure again with this version of the package",
        )
    try:
        evaluation = _from_dict(content, str(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"its content is damaged ({type(error).__name__}: {error})", where=str(path), fix="measure again"
        ) from error
    if evaluation.image_set != content.get("image_set"):
        raise DataError("the images do not have the hash that was saved", where=str(path), fix="measure again")
    return evaluation


def _from_dict(content: Mapping[str, Any], where: str) -> Evaluation:
    images = [MeasuredImage(**image) for image in content["images"]]
    models = [MeasuredModel(model["label"], model["source"], tuple(model["sr"])) for model in content["models"]]
    figures = [_figure(entry, [model.label for model in models], where) for entry in content["metrics"]]
    lengths = {len(model.sr) for model in models} | {len(v) for figure in figures for v in figure.values.values()}
    if lengths != {len(images)}:
        raise ValueError(f"{len(images)} images, but {sorted(lengths)} figures")
    return Evaluation(
        images, models, figures, int(content["bootstrap"]["seed"]), dict(content["facts"]), list(content["left_out"])
    )


def _figure(entry: Mapping[str, Any], labels: Sequence[str], where: str) -> Figure:
    if entry["better"] not in get_args(Better) or entry["kind"] not in get_args(Kind):
        raise ValueError(f"unknown kind of metric {entry['better']!r}, {entry['kind']!r}")
    return Figure(
        name=str(entry["name"]),
        protocol=Protocol.from_dict(entry["protocol"], where=f"{where}, metric {entry['name']!r}"),
        better=entry["better"],
        kind=entry["kind"],
        unit=str(entry["unit"]),
        digits=int(entry["digits"]),
        values={
            label: [nan if value is None else float(value) for value in entry["models"][label]["values"]]
            for label in labels
        },
    )


def join_evaluations(saved: Mapping[str, Evaluation]) -> Evaluation:
    """Puts the models of several evaluations side by side.

    The first model of the first evaluation is the baseline. Models that are called alike and made the same images are
    one; of those that made others, the later ones get the name of their file.

    Args:
        saved: Evaluations by the names of their files, at least two.

    Raises:
        DataError: The sets of images differ, one metric was measured by different protocols, or no metric is in all of
            them; what differs is named.
    """
    (first_name, joined), *others = saved.items()
    for name, other in others:
        joined = _join(first_name, joined, name, other)
    return joined


def _join(first_name: str, first: Evaluation, name: str, other: Evaluation) -> Evaluation:
    where = f"{first_name} and {name}"
    _refuse_other_images(first, other, where)
    _refuse_other_protocols(first, other, where)
    mine, theirs = ({figure.name: figure for figure in each.figures} for each in (first, other))
    common = [key for key in mine if key in theirs]
    if not common:
        raise DataError(
            f"no metric is in both: {', '.join(mine)} and {', '.join(theirs)}",
            where=where,
            fix="measure the same metrics",
        )
    known = {(model.label, model.sr) for model in first.models}
    new = {
        model.label: replace(model, label=_free_label(model.label, name, first.labels))
        for model in other.models
        if (model.label, model.sr) not in known
    }
    figures = [
        replace(
            mine[key],
            values={**mine[key].values} | {model.label: theirs[key].values[label] for label, model in new.items()},
        )
        for key in common
    ]
    alone = [
        f"{key}: only in {place}"
        for place, figures_of in ((first_name, mine), (name, theirs))
        for key in figures_of
        if key not in common
    ]
    return replace(
        first,
        models=[*first.models, *new.values()],
        figures=figures,
        facts={**first.facts, f"facts of {name}": "; ".join(f"{key}: {value}" for key, value in other.facts.items())},
        left_out=[*first.left_out, *other.left_out, *alone],
    )


def _free_label(label: str, file: str, taken: Sequence[str]) -> str:
    return label if label not in taken else f"{label} ({file})"


def _refuse_other_images(first: Evaluation, other: Evaluation, where: str) -> None:
    mine, theirs = ({image.sample_id: image for image in each.images} for each in (first, other))
    problems = [f"{name}: only in one of them" for name in sorted(mine.keys() ^ theirs.keys())]
    for name in (name for name in mine if name in theirs):
        problems += [f"{name}: {what}" for what in _unlike(mine[name], theirs[name])]
    if not problems and list(mine) != list(theirs):
        problems = ["the images are in another order"]
    if problems:
        raise DataError(
            f"they were measured on different images ({first.image_set} and {other.image_set}), so their figures "
            "cannot stand side by side:" + "".join(f"\n  {problem}" for problem in problems),
            where=where,
            fix="measure all models on one set of images, made with one degradation and seed",
        )


def _unlike(mine: MeasuredImage, theirs: MeasuredImage) -> list[str]:
    found = ["other LR pixels"] if mine.lr != theirs.lr else []
    if bool(mine.hr) != bool(theirs.hr):
        return [*found, "an HR image in only one of them"]
    return [*found, "other HR pixels"] if mine.hr != theirs.hr else found


def _refuse_other_protocols(first: Evaluation, other: Evaluation, where: str) -> None:
    theirs = {figure.name: figure.protocol for figure in other.figures}
    problems = [
        f"{figure.name} [{figure.protocol.hash} and {theirs[figure.name].hash}]: "
        + "; ".join(figure.protocol.differences(theirs[figure.name]))
        for figure in first.figures
        if figure.name in theirs and figure.protocol.hash != theirs[figure.name].hash
    ]
    if problems:
        raise DataError(
            "the same metric was measured by different protocols, so its figures cannot stand in one table:"
            + "".join(f"\n  {problem}" for problem in problems),
            where=where,
            fix="measure again with the same versions and judges, or leave these metrics out of one of them",
        )

"""Measures models on one set of images, one model at a time, one image at a time.

What a generator makes is written as PNG files first and measured as those files hold it, so that the very images can
be looked at, measured by other programs, and evaluated again as a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import torch
from jaxtyping import UInt8
from torch import Tensor

from refreward_trl.data.images import read_image, to_float, to_uint8, write_png
from refreward_trl.errors import DataError
from refreward_trl.evaluation.metrics import Metric, Sample
from refreward_trl.evaluation.model_inputs import Inputs, LoadGenerator, Model
from refreward_trl.evaluation.model_results import Evaluation, Figure, MeasuredImage, MeasuredModel
from refreward_trl.evaluation.protocols import digest
from refreward_trl.evaluation.sr_benchmark import Row, Upscaler, super_resolve

Progress: TypeAlias = Callable[[Iterable[int], str], Iterable[int]]
"""Wraps the numbers of the images to measure, with the name of the model."""


@dataclass(frozen=True)
class Measured:
    """An evaluation with its images at hand, for pictures.

    Attributes:
        evaluation: The figures.
        row: `sample_id -> Row` of the set.
        files: By model and `sample_id`, the file with the measured SR image.
    """

    evaluation: Evaluation
    row: Callable[[str], Row]
    files: Mapping[str, Mapping[str, Path]]

    def sr_image(self, label: str, sample_id: str) -> UInt8[Tensor, "3 H W"]:
        """The image that was measured."""
        return read_image(self.files[label][sample_id])


def measure_models(
    models: Sequence[Model],
    inputs: Inputs,
    metrics: Sequence[Metric],
    load_generator: LoadGenerator,
    image_folder: Path,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    facts: Mapping[str, str] | None = None,
    progress: Progress = lambda numbers, _: numbers,
) -> Measured:
    """Measures every model on every image.

    Args:
        models: The models; the first is the baseline.
        inputs: What `read_inputs` checked.
        metrics: What to measure.
        load_generator: Makes a generator of a model's source.
        image_folder: Where the SR images of generators are written: `image_folder/<label>/<sample_id>.png`.
        device: Where generators and networks of other packages run.
        seed: Of the bootstrap.
        facts: What else to save beside what `inputs` says.
        progress: Wraps the numbers of the images.

    Raises:
        DataError: A generator made an image of a wrong size or with NaN.
        RewardError: A metric raised, or returned something that is no number.
        SetupError: An image cannot be written.
    """
    dataset, files, measured = inputs.dataset, dict(inputs.files), []
    values: dict[str, dict[str, list[float]]] = {metric.name: {} for metric in metrics}
    for model in models:
        upscaler = inputs.upscaler(model, load_generator, device)
        if model.label not in files:
            names = dataset.photos
            files[model.label] = {name: sr_file(image_folder / model.label, name) for name in names}
        saves = model.label not in inputs.files
        digests = []
        for metric in metrics:
            values[metric.name][model.label] = []
        for number in progress(range(len(dataset)), model.label):
            row = dataset[number]
            sample = _sample(upscaler, row, torch.device(device))
            pixels = to_uint8(sample.sr_image[0])
            digests.append(pixel_digest(pixels))
            if saves:
                write_png(files[model.label][row["sample_id"]], pixels)
            for metric in metrics:
                values[metric.name][model.label].append(metric.measure(sample))
        measured.append(MeasuredModel(model.label, model.source, tuple(digests)))
        del upscaler  # before the next generator is loaded beside it
    evaluation = Evaluation(
        images=[_measured_image(dataset[number]) for number in range(len(dataset))],
        models=measured,
        figures=[_figure(metric, values[metric.name]) for metric in metrics],
        seed=seed,
        facts={**inputs.facts, **(facts or {})},
    )
    places = {name: number for number, name in enumerate(dataset.photos)}
    return Measured(evaluation, lambda name: dataset[places[name]], files)


def sr_file(folder: Path, sample_id: str) -> Path:
    """Where an SR image belongs.

    Raises:
        DataError: The name leads out of the folder, as a dataset from elsewhere might want.
    """
    parts = PurePosixPath(sample_id).parts
    if not parts or "\0" in sample_id or ".." in parts or PurePosixPath(sample_id).is_absolute():
        raise DataError(
            f"sample_id {sample_id!r} cannot name a file in {folder}", where="the dataset", fix="rename the sample"
        )
    return folder.joinpath(*parts[:-1], f"{parts[-1]}.png")


def pixel_digest(image: UInt8[Tensor, "3 H W"]) -> str:
    """Digest of an image's size and pixels."""
    return digest(repr(tuple(image.shape)).encode(), image.cpu().contiguous().numpy().tobytes())


@torch.no_grad()
def _sample(upscaler: Upscaler, row: Row, device: torch.device) -> Sample:
    lr_image, sr_image, _ = super_resolve(upscaler, row, device)
    hr_image = to_float(row["hr_image"])[None].to(device) if "hr_image" in row else None
    if hr_image is not None and hr_image.shape != sr_image.shape:
        raise DataError(
            f"the SR image has shape {tuple(sr_image.shape[1:])}, the HR image {tuple(hr_image.shape[1:])}",
            where=f"sample {row['sample_id']!r}",
            fix="set --scale to the factor of the generator",
        )
    return Sample(row["sample_id"], lr_image, sr_image, hr_image)


def _measured_image(row: Row) -> MeasuredImage:
    hr = pixel_digest(row["hr_image"]) if "hr_image" in row else ""
    return MeasuredImage(row["sample_id"], pixel_digest(row["lr_image"]), hr)


def _figure(metric: Metric, values: Mapping[str, Sequence[float]]) -> Figure:
    about: dict[str, Any] = {name: getattr(metric, name) for name in ("better", "kind", "unit", "digits")}
    return Figure(metric.name, metric.protocol, values=values, **about)

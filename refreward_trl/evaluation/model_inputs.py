"""The images of an evaluation and the models on them, with everything that is wrong found in one pass.

An evaluation may run for hours. So all files of all folders are read before the first figure is taken, and one error
names every one that is missing, damaged or of the wrong size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from refreward_trl.data.degradations import get_preset
from refreward_trl.data.images import list_images, read_image, to_float
from refreward_trl.data.pairs import PairDataset
from refreward_trl.data.sources import (
    DataProblems,
    ImageFile,
    ImageSource,
    PairSource,
    find_pairs,
    images_by_name,
    pair_folders,
    report_problems,
)
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.evaluation.metrics import Metric
from refreward_trl.evaluation.sr_benchmark import Row, Upscaler, bicubic
from refreward_trl.generators.base import Generator

LABEL = re.compile(r"[A-Za-z0-9][\w.+-]*")
BICUBIC = "bicubic"
GENERATORS = ("default", "new")
HEADERS = ("generator_config.json", "model_index.json")
WEIGHTS = (".safetensors", ".pkl", ".pth", ".pt", ".ckpt", ".bin")
"""Names and endings of files that say that a folder is a generator, whatever pictures lie beside them."""
LISTED = 1000

LoadGenerator = Callable[[str], Generator]


@dataclass(frozen=True)
class ImageSet:
    """The images to evaluate on: two folders, or a dataset as recipes name it.

    Attributes:
        lr: Folder of LR images; None for a dataset.
        hr: Folder of HR images of the same names, or None.
        dataset: What `load_pairs` calls a source; None for folders.
        split: Of the dataset.
        degradation: Preset for LR images made on the fly.
        scale: HR size over LR size.
        seed: Of the degradations.
    """

    lr: Path | None = None
    hr: Path | None = None
    dataset: str | None = None
    split: str | None = None
    degradation: str = "seesr"
    scale: int = 4
    seed: int = 0

    def find(self) -> tuple[list[PairSource], list[DataError]]:
        """Lists the photos that have all their images, and what is wrong with the others."""
        if self.lr is not None:
            return pair_folders(self.lr, self.hr)
        try:
            return find_pairs(self.dataset or "default", self.split), []
        except DataProblems as error:
            return [], error.problems

    @property
    def has_hr(self) -> bool:
        """Whether there are HR images; False where nothing usable is found, which `read_inputs` then tells."""
        return any(pair.hr_image is not None for pair in self.find()[0])

    @property
    def where(self) -> str:
        """Names the set in errors and reports."""
        if self.lr is None:
            return f"{self.dataset}, split {self.split}" if self.split else str(self.dataset)
        return f"{self.lr}, {self.hr}" if self.hr else str(self.lr)


@dataclass(frozen=True)
class Model:
    """A model to evaluate: what it is called, and a generator, a folder of SR images or "bicubic"."""

    label: str
    source: str

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of SR images: it holds images, and no weights."""
        folder = Path(self.source)
        if self.source in (BICUBIC, *GENERATORS) or not folder.is_dir():
            return False
        if any(path.name in HEADERS or path.suffix in WEIGHTS for path in folder.rglob("*")):
            return False
        return bool(list_images(folder, recursive=True))


def read_models(words: Sequence[str]) -> list[Model]:
    """Does what `label_models` does, for a comparison.

    Raises:
        ConfigError: There are fewer than two, or two are called alike.
    """
    models = label_models(words, where="--models")
    if len(models) < 2:
        raise ConfigError(
            "there is nothing to compare: one model", where="--models", fix="add a second one, for example bicubic"
        )
    return models


def label_models(words: Sequence[str], *, where: str) -> list[Model]:
    """Reads `LABEL=SOURCE` or `SOURCE`, which is then called by its last part.

    Raises:
        ConfigError: Two are called alike; `where` names the setting.
    """
    models = []
    for word in words:
        label, equals, source = word.partition("=")
        if not (equals and source and LABEL.fullmatch(label)):
            label, source = re.sub(r"[^\w.+-]", "-", Path(word).name.rpartition(":")[2]), word
            label = label if LABEL.fullmatch(label) else "model"
        models.append(Model(label, source))
    labels = [model.label for model in models]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(
            f"two models are called {repeated[0]!r}", where=where, fix="name them: before=FOLDER after=FOLDER"
        )
    return models


@dataclass(frozen=True)
class Inputs:
    """What was found and checked.

    Attributes:
        dataset: The rows to measure on: whole images.
        files: The SR files of each model that is a folder, by label and `sample_id`.
        facts: What a result says about its images.
    """

    dataset: PairDataset
    files: Mapping[str, Mapping[str, Path]]
    facts: Mapping[str, str]

    def upscaler(self, model: Model, load_generator: LoadGenerator, device: torch.device | str) -> Upscaler:
        """Returns what makes a model's SR images; a generator is loaded now, and dropped with what is returned."""
        if model.label in self.files:
            return _saved_images(self.files[model.label])
        if model.source == BICUBIC:
            return bicubic(self.dataset.scale)
        generator = load_generator(model.source).to(device)
        return lambda lr_image, _: generator.generate(lr_image)


def _saved_images(files: Mapping[str, Path]) -> Upscaler:
    def read(lr_image: torch.Tensor, row: Row) -> torch.Tensor:
        return to_float(read_image(files[row["sample_id"]]))[None].to(lr_image.device)

    return read


def read_inputs(image_set: ImageSet, models: Sequence[Model], metrics: Sequence[Metric]) -> Inputs:
    """Reads every image of the set and of all folders of SR images once.

    Raises:
        ConfigError: A metric needs HR images and there are none, or a setting is wrong.
        DataError: Files are missing, damaged, too small or of a size that does not fit: all are named at once.
    """
    pairs, problems = image_set.find()
    sizes = _sr_sizes(image_set, pairs)
    readable = [pair for pair in pairs if _is_readable(pair, problems)]
    dataset = _dataset(image_set, readable, problems)
    problems += _too_small(readable, sizes, metrics)
    files = {model.label: _check_folder(model, sizes, problems) for model in models if model.is_folder}
    checked = sum(len(_images(pair)) for pair in pairs) + sum(map(len, files.values()))
    report_problems(problems, max(checked, len(problems)), image_set.where, listed=LISTED)
    assert dataset is not None
    if not dataset.has_hr and (needy := [metric.name for metric in metrics if metric.needs_hr]):
        raise ConfigError(
            f"{', '.join(needy)} compare with HR images, and there are none",
            where=image_set.where,
            fix="give --hr, or measure lr_consistency, refreward and others that need none",
        )
    facts = {"images": f"{len(dataset)} of {image_set.where}", "scale": str(image_set.scale)}
    if any(pair.lr_image is None for pair in pairs):
        facts["LR images"] = f"made of the HR images by the preset {image_set.degradation}, seed {image_set.seed}"
    return Inputs(dataset, files, facts)


def _sr_sizes(image_set: ImageSet, pairs: Sequence[PairSource]) -> dict[str, tuple[int, int] | None]:
    """Height and width that the SR image of each LR image must have, also of one whose HR image is missing.

    None stands for an LR image that cannot be read, which is told elsewhere.
    """
    sources: dict[str, ImageSource] = {pair.photo: pair.lr_image or _images(pair)[0] for pair in pairs}
    if image_set.lr is not None:
        sources = {name: ImageFile(path) for name, path in images_by_name(image_set.lr)[0].items()}
    made = {pair.photo for pair in pairs if pair.lr_image is None}
    sizes: dict[str, tuple[int, int] | None] = {}
    for name, source in sources.items():
        try:
            height, width = source.size()
        except DataError:
            sizes[name] = None
            continue
        scale = image_set.scale
        sizes[name] = (
            (height // scale * scale, width // scale * scale) if name in made else (height * scale, width * scale)
        )
    return sizes


def _is_readable(pair: PairSource, problems: list[DataError]) -> bool:
    before = len(problems)
    for image in _images(pair):
        try:
            image.read()
        except DataError as error:
            problems.append(error)
    return len(problems) == before


def _dataset(image_set: ImageSet, pairs: list[PairSource], problems: list[DataError]) -> PairDataset | None:
    if not pairs:
        return None
    try:
        return PairDataset(
            pairs,
            name=image_set.where,
            degradation=get_preset(image_set.degradation),
            scale=image_set.scale,
            crop_size=None,
            crops_per_image=1,
            seed=image_set.seed,
            augmentation="none",
        )
    except DataProblems as error:
        problems += error.problems
        return None


def _images(pair: PairSource) -> list[ImageSource]:
    return [image for image in (pair.lr_image, pair.hr_image) if image is not None]


def _too_small(
    pairs: Sequence[PairSource], sizes: Mapping[str, tuple[int, int] | None], metrics: Sequence[Metric]
) -> list[DataError]:
    return [
        DataError(
            f"SR images of {width}x{height} pixels are too small for {metric.name}, which needs {metric.min_side}",
            where=_images(pair)[0].where,
            fix="leave the small images or the metric out",
        )
        for pair in pairs
        for height, width in [sizes[pair.photo] or (0, 0)]
        for metric in metrics
        if min(height, width) < metric.min_side
    ]


def _check_folder(
    model: Model, sizes: Mapping[str, tuple[int, int] | None], problems: list[DataError]
) -> dict[str, Path]:
    """Returns a model's SR files by the names of their LR images, and adds what is wrong to `problems`."""
    folder = Path(model.source)
    files, found = images_by_name(folder)
    problems += found
    if sizes:
        problems += [
            DataError(
                f"{model.label} has no SR image of this name", where=str(folder / name), fix="make the missing ones"
            )
            for name in sorted(sizes.keys() - files.keys())
        ]
        problems += [
            DataError(f"no LR image has the name of this SR image of {model.label}", where=str(path), fix="remove it")
            for name, path in files.items()
            if name not in sizes
        ]
    for name, path in files.items():
        problems += _check_sr_image(model, path, sizes.get(name))
    return files


def _check_sr_image(model: Model, path: Path, size: tuple[int, int] | None) -> list[DataError]:
    try:
        height, width = read_image(path).shape[-2:]
    except DataError as error:
        return [error]
    if size is None or (height, width) == size:
        return []
    what = f"the SR image of {model.label} has {width}x{height} pixels, not {size[1]}x{size[0]}"
    return [DataError(what, where=str(path), fix="make SR images `scale` times their LR images, or set --scale")]


def check_generators(models: Sequence[Model], inputs: Inputs, load_generator: LoadGenerator) -> None:
    """Loads each generator once and lets it go, so that a wrong one is found before hours have passed.

    Raises:
        ConfigError: A model is nothing that there is.
        RefRewardError: Whatever loading it raises.
    """
    for model in models:
        if model.label in inputs.files or model.source == BICUBIC:
            continue
        if model.source not in GENERATORS and ":" not in model.source and not Path(model.source).exists():
            raise ConfigError(
                f"there is nothing at {model.source!r}",
                where=f"--models, {model.label}",
                fix="name a folder of SR images, a saved generator, default, bicubic, or package.module:attribute",
            )
        load_generator(model.source)

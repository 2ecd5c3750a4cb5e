"""`refreward data build --config RECIPE`: candidates of photos by SR methods and artefacts, and their order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreward_trl.cli.settings import TrainingHelp, settings
from refreward_trl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from refreward_trl.cli.recipe import Recipe
    from refreward_trl.data.pairs import PairDataset
    from refreward_trl.data.preference_building import BuildArguments, BuiltGroup, Sample, Score
    from refreward_trl.data.preference_records import PreferenceRecord
    from refreward_trl.evaluation.model_inputs import Model
    from refreward_trl.evaluation.sr_benchmark import Upscaler

METHOD = "data build"

ABOUT = TrainingHelp(
    method=METHOD,
    description="Makes candidate groups of photos: SR images of several methods, artefacts put on them, the HR image. "
    "Chooses those that are worth comparing, and labels them by the order that is known, by a metric (which is then "
    "named as the source), or not at all, for people to choose.",
    packaged="tiny/preferences",
    groups={
        "photos": ("dataset", "dataset_split", "degradation", "scale", "crop_size", "crops_per_image"),
        "candidates": (
            *("methods", "include_hr", "artefacts", "artefacts_per_group", "artefacts_on"),
            *("candidates_per_group", "choose", "contested_by", "min_difference"),
        ),
        "label": ("label", "tie_margin"),
        "result": ("output_dir", "format", "seed"),
    },
    examples=(
        "refreward data build --config recipes/tiny/preferences.yaml",
        'refreward data build --config tiny/preferences --label psnr_y --methods \'["bicubic", "mine=my_net:build"]\'',
    ),
)


def main(argv: list[str]) -> None:
    """Builds a preference dataset."""
    recipe = settings(argv, ABOUT)
    if recipe is not None:
        build(recipe)


def build(recipe: Recipe) -> None:
    """Makes, chooses and labels candidates, and writes the dataset to `output_dir`.

    SR images are kept beside it until it is written: one method is loaded at a time.

    Raises:
        ConfigError: A setting cannot work.
        DataError: Photos or SR images are missing or do not fit; or no group is worth keeping.
    """
    from refreward_trl.data.preference_building import build_group
    from refreward_trl.data.preference_files import write_preferences
    from refreward_trl.data.sources import report_problems

    arguments, dataset, methods = prepare(recipe)
    score, rivals = load_scores(arguments, has_hr=dataset.has_hr)
    degradation = arguments.degradation if _is_degraded(arguments) else ""
    out = Path(arguments.output_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        stage = Path(folder)
        problems = [problem for model in methods for problem in upscale_photos(model, dataset, stage)]
        report_problems(problems, len(dataset) * len(methods), arguments.dataset)
        records = []
        for number, sample in _progress(samples(dataset, methods, stage), "choose and label", len(dataset)):
            group = build_group(sample, arguments, score=score, rivals=rivals)
            if group is not None:
                records.append(_record(sample, group, arguments.label, degradation, stage / f"group{number}"))
        if not records:
            raise DataError(
                "no group is left: no two candidates differ enough, or none are ordered by the label",
                where=arguments.dataset,
                fix="lower min_difference or tie_margin, or use other methods or artefacts",
            )
        write_preferences(records, out, format=arguments.format)
    left_out = f", {len(dataset) - len(records)} left out" if len(records) < len(dataset) else ""
    print(f"wrote {out}: {len(records)} groups of {len({record.photo for record in records})} photos{left_out}")
    print(f"label: {_describe_label(arguments.label)}")


def prepare(recipe: Recipe) -> tuple[BuildArguments, PairDataset, list[Model]]:
    """Returns the settings, the photos and the methods, once all that can be known at the start is right.

    Raises:
        ConfigError: A setting cannot work.
        DataError: Photos are missing or damaged.
    """
    from refreward_trl.cli.building import build_arguments
    from refreward_trl.data.pairs import load_pairs
    from refreward_trl.data.preference_building import BuildArguments, check_build_arguments
    from refreward_trl.data.preference_files import check_new_folder
    from refreward_trl.evaluation.model_inputs import label_models

    arguments = build_arguments(BuildArguments, recipe.values)
    check_new_folder(Path(arguments.output_dir))
    methods = label_models(arguments.methods, where="methods")
    for model in methods:
        _check_method(model, arguments)
    dataset = load_pairs(
        arguments.dataset,
        degradation=arguments.degradation,
        scale=arguments.scale,
        crop_size=arguments.crop_size,
        crops_per_image=arguments.crops_per_image,
        seed=arguments.seed,
        split=arguments.dataset_split,
        augmentation="none",
    )
    check_build_arguments(arguments, has_hr=dataset.has_hr)
    if (folders := [model.label for model in methods if model.is_folder]) and _is_degraded(arguments):
        raise ConfigError(
            f"the SR images of {', '.join(folders)} were made of other LR images than those that are made here",
            where="dataset",
            fix="name a folder with the LR images beside the HR images (lr/ and hr/), or lr:FOLDER",
        )
    return arguments, dataset, methods


def _is_degraded(arguments: BuildArguments) -> bool:
    """Whether LR images are made here."""
    from refreward_trl.data.sources import find_pairs

    return any(pair.lr_image is None for pair in find_pairs(arguments.dataset, arguments.dataset_split))


def _check_method(model: Model, arguments: BuildArguments) -> None:
    from refreward_trl.data.preference_building import HR
    from refreward_trl.evaluation.model_inputs import BICUBIC, GENERATORS

    where = f"methods, {model.label}"
    if model.label == HR:
        raise ConfigError("hr is the name of the HR image", where=where, fix="call the method something else")
    if model.source in (BICUBIC, *GENERATORS):
        return
    if ":" not in model.source and not Path(model.source).exists():
        raise ConfigError(
            f"there is nothing at {model.source!r}",
            where=where,
            fix="name a folder of SR images, a saved generator, default, bicubic, package.module:attribute or "
            "spandrel:FILE",
        )
    if model.is_folder and arguments.crop_size is not None:
        raise ConfigError(
            "the SR images of a folder are of whole photos, the candidates are crops",
            where=where,
            fix="set crop_size: null",
        )


def load_scores(arguments: BuildArguments, *, has_hr: bool) -> tuple[Score | None, list[Score]]:
    """Returns the metric that labels, if one does, and the two whose disagreement chooses, if it does.

    Raises:
        ConfigError: There is no such metric, or it has no better end, or it needs HR images and there are none.
    """
    from refreward_trl.data.preference_building import CONSTRUCTED, UNLABELLED

    labels = [] if arguments.label in (CONSTRUCTED, UNLABELLED) else [arguments.label]
    rivals = arguments.contested_by if arguments.choose == "contested" else []
    scores = [_load_score(word, "label", has_hr=has_hr, ordered=True) for word in labels]
    return scores[0] if scores else None, [
        _load_score(word, "contested_by", has_hr=has_hr, ordered=False) for word in rivals
    ]


def _load_score(word: str, key: str, *, has_hr: bool, ordered: bool) -> Score:
    from refreward_trl.data.images import to_float
    from refreward_trl.evaluation.metrics import Sample, load_metric

    metric = load_metric(word, device=_device())
    if ordered and metric.better == "neither":
        raise ConfigError(f"{word} says nothing about better and worse", where=key, fix="label by another metric")
    if metric.needs_hr and not has_hr:
        raise ConfigError(f"{word} compares with HR images, and there are none", where=key, fix="use lr_consistency")
    sign = -1.0 if metric.better == "lower" else 1.0

    def score(lr_image: Tensor, sr_image: Tensor, hr_image: Tensor | None) -> float:
        images = [None if image is None else to_float(image)[None] for image in (lr_image, sr_image, hr_image)]
        assert images[0] is not None and images[1] is not None
        return sign * metric.measure(Sample("", images[0], images[1], images[2]))

    return score


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def upscale_photos(model: Model, dataset: PairDataset, stage: Path) -> list[DataError]:
    """Writes a method's SR image of every row to `stage/<label>/<row>.png`; returns what is wrong with them."""
    import torch

    from refreward_trl.data.images import to_float, to_uint8, write_png

    device = _device()
    upscaler, problems = _upscaler(model, dataset, device)
    for number in _progress(range(len(dataset)), model.label, len(dataset)) if not problems else ():
        row = dataset[number]
        lr_image = to_float(row["lr_image"])[None].to(device)
        try:
            with torch.no_grad():
                sr_image = upscaler(lr_image, row)[0]
        except DataError as error:
            problems.append(error)
            continue
        wanted = tuple(dataset.scale * side for side in lr_image.shape[-2:])
        if tuple(sr_image.shape[-2:]) != wanted:
            text = f"the SR image of {model.label} has {sr_image.shape[-1]}x{sr_image.shape[-2]} pixels"
            fix = f"it must enlarge {dataset.scale} times; set scale to what the method does"
            problems.append(DataError(f"{text}, not {wanted[1]}x{wanted[0]}", where=row["sample_id"], fix=fix))
            continue
        write_png(stage / model.label / f"{number}.png", to_uint8(sr_image.cpu()))
    return problems


def _upscaler(model: Model, dataset: PairDataset, device: str) -> tuple[Upscaler, list[DataError]]:
    from refreward_trl.cli.building import build_generator
    from refreward_trl.data.images import read_image, to_float
    from refreward_trl.data.sources import images_by_name
    from refreward_trl.evaluation.model_inputs import BICUBIC
    from refreward_trl.evaluation.sr_benchmark import bicubic
    from refreward_trl.trainers.arguments import GeneratorArguments

    if model.source == BICUBIC:
        return bicubic(dataset.scale), []
    if model.is_folder:
        files, problems = images_by_name(Path(model.source))
        problems += [
            DataError("there is no SR image of this name", where=str(Path(model.source) / name), fix="make it")
            for name in dataset.photos
            if name not in files
        ]
        return lambda lr_image, row: to_float(read_image(files[row["sample_id"]]))[None].to(device), problems
    arguments = GeneratorArguments(generator=model.source)
    generator = build_generator(arguments, scale=dataset.scale, seed=0).to(device)
    return lambda lr_image, row: generator.generate(lr_image), []


def samples(dataset: PairDataset, methods: Sequence[Model], stage: Path) -> Iterator[tuple[int, Sample]]:
    """Yields each row with the SR images that were made of it."""
    from refreward_trl.data.images import read_image
    from refreward_trl.data.preference_building import Sample

    for number in range(len(dataset)):
        row = dataset[number]
        # The row beside it is of another photo, for rows go round the photos.
        other = dataset[(number + 1) % len(dataset)].get("hr_image") if len(dataset.photos) > 1 else None
        yield (
            number,
            Sample(
                sample_id=row["sample_id"],
                lr_image=row["lr_image"],
                hr_image=row.get("hr_image"),
                sr_images={model.label: read_image(stage / model.label / f"{number}.png") for model in methods},
                other=other,
            ),
        )


def _record(sample: Sample, group: BuiltGroup, label: str, degradation: str, folder: Path) -> PreferenceRecord:
    from refreward_trl.data.image_sources import ImageFile
    from refreward_trl.data.images import write_png
    from refreward_trl.data.preference_building import UNLABELLED
    from refreward_trl.data.preference_records import Candidate, PreferenceRecord

    def staged(image: Tensor, name: str) -> ImageFile:
        write_png(folder / f"{name}.png", image)
        return ImageFile(folder / f"{name}.png")

    candidates = [
        Candidate(staged(made.image, str(number)), made.generator, made.kind)
        for number, made in enumerate(group.candidates)
    ]
    return PreferenceRecord(
        sample_id=sample.sample_id,
        photo=sample.sample_id.rpartition("@")[0] or sample.sample_id,
        lr_image=staged(sample.lr_image, "lr"),
        candidates=tuple(candidates),
        ranks={"overall": group.ranks} if group.ranks else {},
        choices=group.choices,
        source="unlabelled" if label == UNLABELLED else label,
        hr_image=None if sample.hr_image is None else staged(sample.hr_image, "hr"),
        degradation=degradation,
    )


def _describe_label(label: str) -> str:
    from refreward_trl.data.preference_building import CONSTRUCTED, UNLABELLED

    known = {CONSTRUCTED: "the order that is known by construction", UNLABELLED: "none; nobody has chosen yet"}
    return known.get(label, f"{label}, a metric: nobody's opinion")


def _progress(items: Any, label: str, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=label, unit="image", total=total)


def plan(recipe: Recipe) -> Mapping[str, Callable[[], str]]:
    """Returns what a dry run tells about a recipe, line by line."""

    def photos() -> str:
        arguments, dataset, _ = prepare(recipe)
        return f"{len(dataset)} LR images of {len(dataset.photos)} photos, to {arguments.output_dir}"

    def methods() -> str:
        return ", ".join(model.label for model in prepare(recipe)[2])

    def label() -> str:
        arguments, dataset, _ = prepare(recipe)
        load_scores(arguments, has_hr=dataset.has_hr)
        return _describe_label(arguments.label)

    return {"photos": photos, "methods": methods, "label": label}

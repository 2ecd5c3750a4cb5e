"""LR/HR pairs as a map-style dataset that is a pure function of (seed, index)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from refreward_trl.data.augmentation import draw_zoom, recolour, resize_crop
from refreward_trl.data.degradations import DegradationPreset, degrade, get_preset
from refreward_trl.data.images import to_float, to_uint8
from refreward_trl.data.prompts import read_prompts
from refreward_trl.data.sources import ImageSource, PairSource, find_pairs, report_problems
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.randomness import stateless_generator

Augmentation = Literal["none", "flips", "strong"]
MAX_CACHE_BYTES = 2**30
"""Datasets whose decoded pixels fit are decoded once, at the start, so that damaged files show before training."""


def load_pairs(
    source: str | Path,
    *,
    degradation: str | DegradationPreset = "seesr",
    scale: int = 4,
    crop_size: int | None = None,
    crops_per_image: int = 1,
    seed: int = 0,
    split: str | None = None,
    augmentation: Augmentation = "flips",
    prompts: str | None = None,
) -> PairDataset:
    """Finds, checks and wraps the pairs of a source.

    Args:
        source: "default" (the photos of the package); a folder with `hr/` and/or `lr/` subfolders of equally named
            images; a flat folder of HR images (`hr:FOLDER`, or just `FOLDER`) or LR images (`lr:FOLDER`); or a Hugging
            Face dataset on disk (imagefolder with metadata, parquet, `save_to_disk`) with image columns hr_image
            and/or lr_image. Missing LR images are degraded from HR on the fly; without HR images there is no hr_image.
        degradation: Preset for LR images made on the fly.
        scale: HR size / LR size.
        crop_size: Side of the random square crops in HR pixels, a multiple of `scale`; None gives whole photos.
        crops_per_image: Number of different crops of each photo.
        seed: Fixes crops, flips and degradations.
        split: Of the default photos: train, heldout, val or test. Of a Hugging Face dataset: one of its splits. Of a
            folder: the subfolder of that name if there is one, else the whole folder. None: train, or the first split.
        augmentation: Of crops: "flips" and quarter turns, "strong" (also zoomed and recoloured, for few photos; the LR
            images must be made on the fly), or "none".
        prompts: Where the column `prompt` comes from, see `data.prompts.read_prompts`; None leaves it to the source.

    Returns:
        The dataset. All headers have been checked, and all pixels too when they fit into `MAX_CACHE_BYTES`.

    Raises:
        ConfigError: An argument cannot work.
        DataError: Images are missing, unreadable or of sizes that do not fit; the first ten are named and all counted.
    """
    pairs = find_pairs(source, split)
    return PairDataset(
        pairs,
        name=str(source),
        degradation=get_preset(degradation),
        scale=scale,
        crop_size=crop_size,
        crops_per_image=crops_per_image,
        seed=seed,
        augmentation=augmentation,
        prompts=None if prompts is None else read_prompts(prompts, pairs),
    )


@dataclass(frozen=True)
class CropSettings:
    """One random crop: position and side in LR or HR pixels of the image it was drawn for, then flip, then turns."""

    top: int
    left: int
    side: int
    flip: bool
    quarter_turns: int

    def apply(self, image: Tensor, scale: int = 1) -> Tensor:
        """Cuts the crop out of `(3, H, W)`, whose pixels are `scale` times smaller than those of the crop."""
        top, left, side = self.top * scale, self.left * scale, self.side * scale
        image = image[:, top : top + side, left : left + side]
        if self.flip:
            image = image.flip(-1)
        return image.rot90(self.quarter_turns, (-2, -1)).contiguous()


class PairDataset(Dataset[dict[str, Any]]):
    """Rows `{"sample_id", "lr_image": uint8 (3, h, w), "hr_image": uint8 (3, h * scale, w * scale), ...}`.

    Row `i` is draw `i // n` of photo `i % n`; its `sample_id` is `"<photo>@<draw>"`, or `"<photo>"` for whole photos.
    Rows have no `hr_image` when the source has none, and carry the source's further columns. Nothing else changes what
    a row is: neither order, worker, rank nor epoch.

    Attributes:
        photos: The names of the photos, in order.
        has_hr: Whether rows have an `hr_image`.
    """

    def __init__(
        self,
        pairs: list[PairSource],
        *,
        name: str,
        degradation: DegradationPreset,
        scale: int,
        crop_size: int | None,
        crops_per_image: int,
        seed: int,
        augmentation: Augmentation,
        prompts: Mapping[str, str] | None = None,
    ) -> None:
        _check_arguments(scale, crop_size, crops_per_image, augmentation)
        if augmentation == "strong" and any(pair.lr_image is not None for pair in pairs):
            raise ConfigError(
                f"augmentation is strong, but {name} has LR images of its own, which no longer fit a zoomed HR image",
                where="augmentation",
                fix="use augmentation: flips",
            )
        self.degradation = degradation
        self.scale = scale
        self.crop_size = crop_size
        self.crops_per_image = crops_per_image
        self.seed = seed
        self.augmentation = augmentation
        self.prompts = prompts
        self.photos = [pair.photo for pair in pairs]
        self.has_hr = pairs[0].hr_image is not None
        self._pairs = pairs
        self._pixels: dict[int, dict[str, Tensor]] = {}
        self._keeps_pixels = False
        self._check(name)

    def __len__(self) -> int:
        return len(self._pairs) * self.crops_per_image

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        draw, number = divmod(index, len(self._pairs))
        pair, images = self._pairs[number], self._images(number)
        if self.crop_size is not None:
            images = self._crop(images, self.crop_size, pair.photo, draw)
        else:
            images = {key: image.clone() for key, image in images.items()}  # the kept pixels stay ours
        if "lr_image" not in images:
            generator = stateless_generator(self.seed, "degradation", pair.photo, draw)
            lr_image = degrade(to_float(images["hr_image"]), self.degradation, generator=generator, scale=self.scale)
            images = {"lr_image": to_uint8(lr_image), **images}
        sample_id = pair.photo if self.crop_size is None else f"{pair.photo}@{draw}"
        prompt = {} if self.prompts is None else {"prompt": self.prompts[pair.photo]}
        return {"sample_id": sample_id, **images, **pair.others.read(), **prompt}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the pixels behind: a worker process decodes what it needs."""
        return {**self.__dict__, "_pixels": {}}

    def _images(self, number: int) -> dict[str, Tensor]:
        """Returns the whole images of one photo, HR cropped to a multiple of `scale`."""
        if number in self._pixels:
            return self._pixels[number]
        pair = self._pairs[number]
        images = {key: source.read() for key, source in _present(pair).items()}
        self._check_sizes(pair, {key: (image.shape[1], image.shape[2]) for key, image in images.items()})
        if "hr_image" in images:
            height, width = (side - side % self.scale for side in images["hr_image"].shape[1:])
            images["hr_image"] = images["hr_image"][:, :height, :width].contiguous()
        if self._keeps_pixels:
            self._pixels[number] = images
        return images

    def _crop(self, images: dict[str, Tensor], crop_size: int, photo: str, draw: int) -> dict[str, Tensor]:
        """Cuts the same place out of all images of a photo; with an LR image the crop starts on its pixel grid."""
        generator = stateless_generator(self.seed, "crop", photo, draw)
        grid, side = ("lr_image", crop_size // self.scale) if "lr_image" in images else ("hr_image", crop_size)
        height, width = images[grid].shape[1:]
        changes = stateless_generator(self.seed, "augmentation", photo, draw)
        strong = self.augmentation == "strong"
        if strong:
            side = min(round(side / draw_zoom(changes)), height, width)
        limits = (height - side + 1, width - side + 1, *((1, 1) if self.augmentation == "none" else (2, 4)))
        top, left, flip, turns = (int(torch.randint(limit, (), generator=generator)) for limit in limits)
        crop = CropSettings(top, left, side, bool(flip), turns)
        images = {key: crop.apply(image, 1 if key == grid else self.scale) for key, image in images.items()}
        if strong:
            image = resize_crop(to_float(images["hr_image"]), crop_size)
            images["hr_image"] = to_uint8(recolour(image, changes))
        return images

    def _check(self, name: str) -> None:
        """Checks every image and reports all problems at once; decodes and keeps the pixels when they fit."""
        problems: list[DataError] = []
        pixels: dict[int, int] = {}
        for number, pair in enumerate(self._pairs):
            try:
                sizes = {key: source.size() for key, source in _present(pair).items()}
                self._check_sizes(pair, sizes)
                pixels[number] = sum(height * width for height, width in sizes.values())
            except DataError as error:
                problems.append(error)
        self._keeps_pixels = 3 * sum(pixels.values()) <= MAX_CACHE_BYTES
        for number in pixels if self._keeps_pixels else ():
            try:
                self._images(number)
            except DataError as error:
                problems.append(error)
        report_problems(problems, len(self._pairs), name)

    def _check_sizes(self, pair: PairSource, sizes: dict[str, tuple[int, int]]) -> None:
        """Refuses a photo whose (height, width) are too small, or do not fit each other."""
        for key, source in _present(pair).items():
            unit = self.scale if key == "hr_image" else 1
            least = (self.crop_size or self.scale) // self.scale * unit
            height, width = sizes[key]
            if min(height, width) < least:
                raise DataError(
                    f"{key} of {width}x{height} pixels is smaller than {least}x{least}",
                    where=source.where,
                    fix="remove small images, or lower crop_size",
                )
        if len(sizes) == 2 and sizes["hr_image"] != tuple(side * self.scale for side in sizes["lr_image"]):
            (height, width), (lr_height, lr_width) = sizes["hr_image"], sizes["lr_image"]
            raise DataError(
                f"hr_image of {width}x{height} pixels is not {self.scale} times lr_image of {lr_width}x{lr_height}",
                where=_present(pair)["hr_image"].where,
                fix=f"make both fit (hr = {self.scale} x lr), or set scale",
            )


def _present(pair: PairSource) -> dict[str, ImageSource]:
    """Returns the images that a photo has, by column."""
    both = {"lr_image": pair.lr_image, "hr_image": pair.hr_image}
    return {key: source for key, source in both.items() if source is not None}


def _check_arguments(scale: int, crop_size: int | None, crops_per_image: int, augmentation: str) -> None:
    if augmentation not in get_args(Augmentation):
        raise ConfigError(
            f"augmentation is {augmentation!r}", where="augmentation", fix=f"use {', '.join(get_args(Augmentation))}"
        )
    if scale < 1:
        raise ConfigError(f"scale {scale} is not positive", where="scale", fix="use the generator's scale, e.g. 4")
    if crop_size is not None and (crop_size < scale or crop_size % scale):
        raise ConfigError(
            f"crop_size {crop_size} is not a positive multiple of scale {scale}",
            where="crop_size",
            fix=f"use {max(scale, crop_size // scale * scale)}",
        )
    if crops_per_image < 1:
        raise ConfigError(
            f"crops_per_image {crops_per_image} is below 1", where="crops_per_image", fix="use 1 or more"
        )
    if crop_size is None and crops_per_image > 1:
        raise ConfigError(
            f"crops_per_image {crops_per_image} without crop_size would repeat whole photos",
            where="crops_per_image",
            fix="set crop_size, or leave crops_per_image at 1",
        )

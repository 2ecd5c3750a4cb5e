"""Image files with all that must survive an enlargement: depth, grey, alpha, colour profile and EXIF data.

`read_image` is for rewards, which need 8-bit RGB and refuse the rest. Here a picture is what a person would call it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin

from refreward_trl.data.images import MAX_PIXELS, open_strictly
from refreward_trl.errors import DataError

_GREY_MODES = ("1", "L", "LA", "La")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
_SIXTEEN_BIT_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_DEEP_MODES = ("RGB;16", "RGBA;16")
_DEEP_GREY_ALPHA = "LA;16B"
_OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}

_CARRIED_TAGS = frozenset(
    {
        ExifTags.Base.ImageDescription,
        ExifTags.Base.Make,
        ExifTags.Base.Model,
        ExifTags.Base.Orientation,
        ExifTags.Base.XResolution,
        ExifTags.Base.YResolution,
        ExifTags.Base.ResolutionUnit,
        ExifTags.Base.Software,
        ExifTags.Base.DateTime,
        ExifTags.Base.Artist,
        ExifTags.Base.Copyright,
    }
)
"""What describes the photo; the rest of a TIFF's tags describes the file."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded image file, upright.

    Attributes:
        pixels: `(h, w, 1)` grey or `(h, w, 3)` RGB, uint8 or uint16.
        alpha: `(h, w)` of the same type, or None without transparency.
        icc_profile: What the values mean; None is sRGB.
        exif: Its EXIF data, the orientation set to upright.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc_profile: bytes | None = None
    exif: Image.Exif | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def largest(self) -> int:
        """The value of white: 255 or 65535."""
        return int(np.iinfo(self.pixels.dtype).max)


def read_picture(path: Path, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Reads an image file, EXIF orientation applied. Colours are not converted.

    A bilevel image becomes grey, a palette RGB; transparency in whatever form becomes alpha.

    Raises:
        DataError: The file is missing, empty, truncated, no image, too large, animated, CMYK, or of a pixel type that
            is neither grey nor RGB of 8 or 16 bits. The message names the file.
    """
    where = str(path)
    stored = open_strictly(path, _raw_mode, max_pixels=max_pixels)
    if stored == _DEEP_GREY_ALPHA:
        return open_strictly(path, _deep_grey_alpha, max_pixels=max_pixels)
    picture = open_strictly(path, lambda image: _picture(image, where), max_pixels=max_pixels)
    if not _is_deep_colour(stored):
        return picture
    # Pillow holds 8 bits of a colour: it gives the upper bytes, and read in the other byte order the lower ones.
    lower = open_strictly(path, lambda image: _picture(_swapped(image), where), max_pixels=max_pixels)
    pixels, alpha = _joined(picture.pixels, lower.pixels), picture.alpha
    if alpha is not None and lower.alpha is not None:
        alpha = _joined(alpha, lower.alpha)
    return Picture(pixels, alpha, picture.icc_profile, picture.exif)


def _picture(image: Image.Image, where: str) -> Picture:
    _check_mode(image, where)
    _check_deep(image, where)
    exif = _carried_exif(image)
    icc_profile = image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _SIXTEEN_BIT_GREY:
        values = np.asarray(upright).astype(np.uint16)
        key = image.info.get("transparency")
        alpha = None if key is None else np.where(values == key, 0, 65535).astype(np.uint16)
        return Picture(values[..., None], alpha, icc_profile, exif)
    grey, transparent = upright.mode in _GREY_MODES, upright.has_transparency_data
    values = np.asarray(_converted(upright, grey, transparent))
    if values.ndim == 2:
        values = values[..., None]
    count = 1 if grey else 3
    alpha = np.ascontiguousarray(values[..., count]) if transparent else None
    return Picture(np.ascontiguousarray(values[..., :count]), alpha, icc_profile, exif)


def _converted(image: Image.Image, grey: bool, transparent: bool) -> Image.Image:
    if not grey:
        return image.convert("RGBA" if transparent else "RGB")
    if image.mode == "1":
        image = image.convert("L")
    if not transparent:
        return image.convert("L")
    # Pillow turns a grey value that stands for transparency into alpha only on the way to RGBA.
    return image.convert("RGBA").convert("LA") if image.mode == "L" else image.convert("LA")


def _check_mode(image: Image.Image, where: str) -> None:
    if image.mode == "CMYK":
        raise DataError(
            "the image is CMYK, which has no fixed RGB colours",
            where=where,
            fix="convert it with its profile, e.g. `magick IN -profile sRGB.icc OUT.png`",
        )
    if image.mode not in (*_GREY_MODES, *_COLOUR_MODES, *_SIXTEEN_BIT_GREY):
        raise DataError(
            f"pixel type {image.mode!r} is neither grey nor RGB of 8 or 16 bits",
            where=where,
            fix="convert it, e.g. `magick IN -depth 16 OUT.png`",
        )


def _check_deep(image: Image.Image, where: str) -> None:
    """Refuses 16-bit colours of which Pillow would make something else."""
    stored = _raw_mode(image)
    # It compares 8 bits of a colour that stands for transparency, and takes planes of 16 bits for planes of 8.
    unread = _is_deep_colour(stored) and ("transparency" in image.info or stored[:-1] not in _DEEP_MODES)
    if unread or _has_deep_planes(image):
        raise DataError(
            "16-bit colour in a form that Pillow reads with 8 bits",
            where=where,
            fix="convert it to a plain 16-bit PNG, e.g. `magick IN PNG48:OUT.png`",
        )


def _has_deep_planes(image: Image.Image) -> bool:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    planar = image.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
    return planar and max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8


def _is_deep_colour(stored: str) -> bool:
    return ";16" in stored and not stored.startswith("I;")


def _raw_mode(image: Image.Image) -> str:
    """Returns how the file stores a pixel, in Pillow's words, where its decoder is told that; else nothing."""
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else ()
    arguments = tiles[0][3] if tiles else ""
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw if isinstance(raw, str) else ""


def _swapped(image: Image.Image) -> Image.Image:
    """Makes the decoder take the other byte of each 16-bit value."""
    assert isinstance(image, ImageFile.ImageFile)
    raw = _raw_mode(image)
    other = raw[:-1] + _OTHER_ORDER[raw[-1]]
    image.tile = [
        tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other) for tile in image.tile
    ]
    return image


def _deep_grey_alpha(image: Image.Image) -> Picture:
    """Reads the four bytes of a pixel as if they were four channels."""
    assert isinstance(image, ImageFile.ImageFile)
    # First, because looking for EXIF data decodes a PNG.
    image.tile = [tile._replace(args="RGBA") for tile in image.tile]
    exif = _carried_exif(image)
    stored = np.asarray(ImageOps.exif_transpose(image))
    grey, alpha = _joined(stored[..., 0], stored[..., 1]), _joined(stored[..., 2], stored[..., 3])
    return Picture(grey[..., None], alpha, image.info.get("icc_profile"), exif)


def _joined(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    return upper.astype(np.uint16) << 8 | lower


def _carried_exif(image: Image.Image) -> Image.Exif | None:
    """Returns what describes the photo, with the orientation set to upright, or None where nothing does."""
    exif, carried = image.getexif(), Image.Exif()
    for tag in _CARRIED_TAGS & set(exif):
        carried[tag] = exif[tag]
    camera, place = dict(exif.get_ifd(ExifTags.IFD.Exif)), dict(exif.get_ifd(ExifTags.IFD.GPSInfo))
    # The size of the image that was; and a blob whose inner offsets would point nowhere.
    for tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight, ExifTags.Base.MakerNote):
        camera.pop(tag, None)
    for tag, values in ((ExifTags.IFD.Exif, camera), (ExifTags.IFD.GPSInfo, place)):
        if values:
            carried[tag] = values
    if ExifTags.Base.Orientation in carried:
        carried[ExifTags.Base.Orientation] = 1
    return carried if dict(carried) else None

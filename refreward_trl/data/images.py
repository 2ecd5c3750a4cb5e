"""Strict image reading and the conversions between files, PIL images and tensors.

A reward must never score pixels that nobody meant: half a file, a transparent image on an invented background, or a
photo lying on its side. Whatever cannot be read as opaque 8-bit RGB without guessing is refused, with its name.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from refreward_trl.errors import DataError, SetupError

T = TypeVar("T")

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
"""The only decoders that are ever tried, whatever the file is called."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})

MAX_PIXELS = 8192 * 8192
"""Default limit on width * height, checked on the header before any pixel is decoded."""

_FORMATS_TEXT = "PNG, JPEG, WebP, TIFF or BMP"
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_EIGHT_BIT_MODES = ("1", "L", "P", "RGB", "LA", "La", "PA", "RGBA", "RGBa", "RGBX", "YCbCr")
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    AttributeError,
    struct.error,
)
"""What Pillow has been seen to raise, or is known to, where the bytes of an image are wrong."""

_RGB_FIX = "convert it to 8-bit RGB, e.g. `magick IN -colorspace sRGB -depth 8 OUT.png`"


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "3 H W"]:
    """Reads an image file.

    The EXIF orientation is applied; grey and palette images become RGB; a fully opaque alpha channel is dropped;
    16-bit grey is rounded to 8 bit (of 16-bit colour Pillow keeps the high byte). Of a multi-picture JPEG (phones) the
    main picture is taken. Colour profiles are not applied: values are taken as sRGB.

    Args:
        path: The file; its content decides about the format, not its name.
        max_pixels: Largest allowed width * height.

    Returns:
        uint8 `(3, H, W)`.

    Raises:
        DataError: The file is missing, empty, truncated, no image, too large, animated, partly transparent, CMYK, or
            of a pixel type that does not fit 8-bit RGB. The message names the file.
    """
    path = Path(path)
    _check_file(path)
    return _open(path, str(path), lambda image: from_pil(image, where=str(path), max_pixels=max_pixels))


def decode_image(data: bytes, *, where: str, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "3 H W"]:
    """Decodes the bytes of an image file, as `read_image` does; `where` names them in errors (row and column)."""
    _check_head(data[:64], where)
    return _open(io.BytesIO(data), where, lambda image: from_pil(image, where=where, max_pixels=max_pixels))


def read_size(
    source: str | Path | bytes, *, where: str | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Returns (height, width) in pixels, orientation applied, from the header alone.

    Refuses all that `read_image` refuses, except damaged or transparent pixels, which only decoding shows.

    Args:
        source: A file, or the bytes of one.
        where: Names the image in errors; the file's path by default.
        max_pixels: Largest allowed width * height.
    """
    if isinstance(source, bytes):
        name, file = where or "image", io.BytesIO(source)
        _check_head(source[:64], name)
    else:
        name, file = where or str(source), Path(source)
        _check_file(file)

    def peek(image: Image.Image) -> tuple[int, int]:
        _check_size(image, name, max_pixels)
        _check_frames(image, name)
        _check_mode(image, name)
        # Pillow decodes a whole PNG to look for EXIF data behind the pixels, where nearly no writer puts it; a TIFF's
        # size comes with its orientation applied.
        settled = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
        sideways = not settled and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return image.size if sideways else (image.height, image.width)

    return _open(file, name, peek)


def open_strictly(path: Path, use: Callable[[Image.Image], T], *, max_pixels: int = MAX_PIXELS) -> T:
    """Opens an image file and returns `use(image)`, for those who need more than `read_image` returns.

    Raises:
        DataError: The file is missing, empty, truncated, no image, too large or animated, or `use` found it damaged.
    """
    where = str(path)
    _check_file(path)

    def checked(image: Image.Image) -> T:
        _check_size(image, where, max_pixels)
        _check_frames(image, where)
        _check_strips(image, where)
        return use(image)

    return _open(path, where, checked)


def from_pil(image: Image.Image, *, where: str = "PIL image", max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "3 H W"]:
    """Converts a PIL image to uint8 `(3, H, W)` with the same rules and refusals as `read_image`."""
    _refuse_truncated_loading()
    _check_size(image, where, max_pixels)
    try:
        _check_frames(image, where)
        _check_strips(image, where)
        return _to_tensor(_to_rgb(ImageOps.exif_transpose(image), where))
    except _DECODER_ERRORS as error:
        raise _broken(error, where) from error


def to_float(image: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """uint8 of any shape -> float32 in [0, 1]; a float tensor keeps its values (and graph) and becomes float32."""
    return image.float() if image.is_floating_point() else image.float() / 255


def to_uint8(image: Shaped[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Float in [0, 1] of any shape -> uint8, clamped and rounded to nearest; uint8 passes through.

    Raises:
        DataError: The image holds NaN or infinity, which would silently become black or white.
    """
    if image.dtype == torch.uint8:
        return image
    image = image.detach()
    if not bool(torch.isfinite(image).all()):
        raise DataError("the image holds NaN or infinite values", where="image")
    return (image.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(image: Shaped[Tensor, "3 H W"]) -> Image.Image:
    """One `(3, H, W)` image, uint8 or float in [0, 1] -> 8-bit RGB PIL image."""
    if image.dim() != 3 or image.shape[0] != 3:
        raise DataError(f"expected one image (3, H, W), got shape {tuple(image.shape)}", where="image")
    return Image.fromarray(to_uint8(image).cpu().permute(1, 2, 0).contiguous().numpy())


def write_png(path: str | Path, image: Shaped[Tensor, "3 H W"]) -> None:
    """Writes one `(3, H, W)` image, uint8 or float in [0, 1], as an 8-bit PNG; missing folders are made.

    The file appears complete or not at all: it is written beside its place and renamed.

    Raises:
        SetupError: The file cannot be written (disk full, no permission).
    """
    path = Path(path)
    picture = to_pil(image)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            picture.save(file, "PNG")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise SetupError(f"cannot write the image: {error.strerror or error}", where=str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def list_images(folder: str | Path, *, recursive: bool = False) -> list[Path]:
    """Returns the image files of a folder, chosen by suffix and sorted by path; other and hidden files are ignored.

    Raises:
        DataError: The folder does not exist or cannot be listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError("the folder does not exist" if not folder.exists() else "not a folder", where=str(folder))
    found: list[Path] = []
    for parent, names, files in os.walk(folder, onerror=_raise_unreadable):
        names[:] = [name for name in names if recursive and not name.startswith(".")]
        found += [Path(parent, name) for name in files if is_image_name(name) and Path(parent, name).is_file()]
    return sorted(found, key=Path.as_posix)


def is_image_name(name: str) -> bool:
    """Says whether a file name has an image suffix and is not hidden."""
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"the folder cannot be listed: {error.strerror}", where=str(error.filename)) from error


def _check_file(path: Path) -> None:
    """Refuses by name what no decoder needs to see."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError as error:
        raise DataError("the file does not exist", where=str(path)) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"the file cannot be read: {error}", where=str(path)) from error
    _check_head(head, str(path))


def _check_head(head: bytes, where: str) -> None:
    if not head:
        raise DataError("the image is empty (0 bytes)", where=where, fix="remove it, or fetch it again")
    if looks := _looks_like_text(head):
        raise DataError(looks, where=where, fix="fetch the image itself, then try again")


def _looks_like_text(head: bytes) -> str | None:
    """Names the two kinds of text that are most often saved under an image's name."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"{")):
        return "the data is HTML, XML or JSON text, not an image"
    if start.startswith(b"version https://git-lfs"):
        return "the data is a Git LFS pointer, not the image itself"
    return None


def _open(source: Path | io.BytesIO, where: str, use: Callable[[Image.Image], T]) -> T:
    """Opens an image, returns `use(image)` and translates what Pillow raises meanwhile."""
    _refuse_truncated_loading()
    try:
        with Image.open(source, formats=FORMATS) as image:
            return use(image)
    except UnidentifiedImageError as error:
        raise DataError(
            f"not a readable {_FORMATS_TEXT} image (the header is damaged, or it is another format)",
            where=where,
            fix="fetch or export the image again",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"too many pixels: {error}", where=where, fix="downscale or tile the image") from error
    except _DECODER_ERRORS as error:
        raise _broken(error, where) from error


def _refuse_truncated_loading() -> None:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise SetupError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which fills damaged images with black",
            where="Pillow",
            fix="set PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False",
        )


def _check_size(image: Image.Image, where: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{width}x{height} = {width * height} pixels is above the limit of {max_pixels}",
            where=where,
            fix="downscale or tile the image, or raise max_pixels",
        )


def _check_frames(image: Image.Image, where: str) -> None:
    if image.format == "MPO":  # a photo with a preview or a gain map behind it: the first frame is the photo
        return
    try:
        image.seek(1)
    except EOFError:
        return
    raise DataError("the image is animated or has several pages", where=where, fix="export one frame as PNG")


def _check_strips(image: Image.Image, where: str) -> None:
    """Refuses a TIFF whose strips or tiles do not cover it: Pillow leaves the rest black, without a word."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or not image.tile:
        return
    layers = len(image.getbands()) if image.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 else 1
    areas = (max(0, right - left) * max(0, bottom - top) for left, top, right, bottom in _extents(image))
    if sum(areas) < layers * image.width * image.height:
        raise DataError(
            "the image is damaged or truncated (its parts do not cover its width and height)",
            where=where,
            fix="fetch or export the image again",
        )


def _extents(image: ImageFile.ImageFile) -> Iterator[tuple[int, int, int, int]]:
    for tile in image.tile:
        yield tile[1] or (0, 0, *image.size)


def _check_mode(image: Image.Image, where: str) -> None:
    if image.mode == "CMYK":
        raise DataError("the image is CMYK, which has no fixed RGB colours", where=where, fix=_RGB_FIX)
    if image.mode not in _SIXTEEN_BIT_MODES and image.mode not in _EIGHT_BIT_MODES:
        raise DataError(f"pixel type {image.mode!r} does not fit 8-bit RGB", where=where, fix=_RGB_FIX)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Converts to mode RGB where that loses nothing that can be seen; refuses otherwise."""
    _check_mode(image, where)
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        lowest = int(np.asarray(image.getchannel("A")).min())
        if lowest < 255:
            raise DataError(
                f"the image is partly transparent (alpha down to {lowest}), so its colours depend on a background",
                where=where,
                fix="flatten it, e.g. `magick IN -background white -flatten OUT.png`",
            )
    return image.convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _broken(error: Exception, where: str) -> DataError:
    return DataError(
        f"the image is damaged or truncated ({error})",
        where=where,
        fix="fetch or export the image again",
    )

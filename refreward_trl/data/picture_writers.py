"""Writes images row by row, so that none is ever whole in memory where its format allows that.

PNG and TIFF are written as the rows come, with 8 or 16 bits. Pillow's JPEG and WebP encoders want the whole image with
8 bits: its rows wait in a file, and memory holds the image only while nothing else is done.
"""

from __future__ import annotations

import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

from refreward_trl.errors import DISK_ERRORS, DataError, SetupError

SIXTEEN_BIT_FORMATS = frozenset({"png", "tif"})

_LONGEST_SIDE = {"png": 2**31 - 1, "jpg": 65500, "webp": 16383, "tif": 2**31 - 1}
_PNG_COLOR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}
_STRIP = 64
"""Rows that are compressed together in a TIFF, and pasted at once into a Pillow image."""


@dataclass(frozen=True)
class Layout:
    """What is going to be written.

    Attributes:
        height: Rows.
        width: Columns.
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
        depth: Bits of a channel, 8 or 16.
        icc_profile: Of the colours.
        exif: EXIF data.
    """

    height: int
    width: int
    channels: int
    depth: int = 8
    icc_profile: bytes | None = None
    exif: Image.Exif | None = None

    @property
    def mode(self) -> str:
        """Pillow's name for 8 bits of it."""
        return {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[self.channels]

    def exif_bytes(self) -> bytes:
        """The EXIF data as a TIFF of its own, without the marker of JPEG files."""
        return b"" if self.exif is None else self.exif.tobytes().removeprefix(b"Exif\0\0")


def check_layout(kind: str, layout: Layout, where: str) -> None:
    """Raises `DataError` if a format cannot hold an image, so that nobody computes it first."""
    longest = max(layout.height, layout.width)
    if longest > _LONGEST_SIDE[kind]:
        raise DataError(
            f"{layout.width}x{layout.height} does not fit a {kind} file, whose sides end at {_LONGEST_SIDE[kind]}",
            where=where,
            fix="write it with --format png, or enlarge it less",
        )
    if kind == "jpg" and layout.channels in (2, 4):
        raise DataError(
            "the image is partly transparent, which a jpg file cannot hold", where=where, fix="use --format png"
        )
    if layout.depth == 16 and kind not in SIXTEEN_BIT_FORMATS:
        raise DataError(f"a {kind} file holds 8 bits, not 16", where=where, fix="use --format png")


class RowWriter(ABC):
    """An image file that is being written from top to bottom."""

    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self.file = file
        self.layout = layout

    @abstractmethod
    def write(self, rows: np.ndarray) -> None:
        """Takes the next rows, `(n, width, channels)`, uint8 or uint16 by the layout's depth."""

    @abstractmethod
    def finish(self) -> None:
        """Completes the file; all rows have come."""

    def close(self) -> None:  # noqa: B027 (most writers hold nothing)
        """Lets go of what it holds besides the file, finished or not."""


@contextmanager
def open_writer(path: Path, kind: str, layout: Layout, *, quality: int) -> Iterator[RowWriter]:
    """Writes an image that appears complete, in one rename, or not at all; missing folders are made.

    Args:
        path: Where it appears.
        kind: "png", "jpg", "webp" or "tif".
        layout: What it is.
        quality: Of jpg and webp, 1 to 100; 100 is lossless for webp.

    Raises:
        DataError: The format cannot hold it.
        SetupError: It cannot be written (disk full, no permission).
    """
    check_layout(kind, layout, str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            writer = _make(file, kind, layout, quality, temporary)
            try:
                yield writer
                writer.finish()
            finally:
                writer.close()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise SetupError(
            f"cannot write the image: {DISK_ERRORS[error.errno]}",
            where=str(path),
            fix="free space, or write elsewhere",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _make(file: BinaryIO, kind: str, layout: Layout, quality: int, temporary: Path) -> RowWriter:
    if kind == "png":
        return PngWriter(file, layout)
    if kind == "tif":
        return TiffWriter(file, layout)
    return PillowWriter(file, layout, "JPEG" if kind == "jpg" else "WEBP", quality, temporary)


class PngWriter(RowWriter):
    """PNG of 8 or 16 bits, each row filtered by Paeth's predictor, which suits photos."""

    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        super().__init__(file, layout)
        self._pixel = layout.channels * layout.depth // 8
        self._above = np.zeros((1, layout.width * self._pixel), np.uint8)
        self._stream = zlib.compressobj(6, strategy=zlib.Z_FILTERED)
        file.write(b"\x89PNG\r\n\x1a\n")
        header = struct.pack(
            ">IIBBBBB", layout.width, layout.height, layout.depth, _PNG_COLOR_TYPE[layout.channels], 0, 0, 0
        )
        self._chunk(b"IHDR", header)
        if layout.icc_profile:
            self._chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(layout.icc_profile))
        if exif := layout.exif_bytes():
            self._chunk(b"eXIf", exif)

    def write(self, rows: np.ndarray) -> None:
        for start in range(0, len(rows), _STRIP):
            self._write_some(rows[start : start + _STRIP])

    def finish(self) -> None:
        self._chunk(b"IDAT", self._stream.flush())
        self._chunk(b"IEND", b"")

    def _write_some(self, rows: np.ndarray) -> None:
        stored = rows.astype(">u2") if self.layout.depth == 16 else rows
        lines = np.ascontiguousarray(stored).view(np.uint8).reshape(len(rows), -1)
        filtered = np.empty((len(lines), lines.shape[1] + 1), np.uint8)
        filtered[:, 0] = 4
        filtered[:, 1:] = lines - self._predicted(lines)
        self._above = lines[-1:].copy()
        if data := self._stream.compress(filtered.tobytes()):
            self._chunk(b"IDAT", data)

    def _predicted(self, lines: np.ndarray) -> np.ndarray:
        """Paeth's predictor: of left, above and above-left the one nearest to left + above - above-left."""
        above = np.concatenate([self._above, lines[:-1]]).astype(np.int16)
        left, corner = np.zeros_like(above), np.zeros_like(above)
        left[:, self._pixel :] = lines[:, : -self._pixel]
        corner[:, self._pixel :] = above[:, : -self._pixel]
        to_left, to_above = np.abs(above - corner), np.abs(left - corner)
        to_corner = np.abs(left + above - 2 * corner)
        best = np.where(to_above <= to_corner, above, corner)
        best = np.where((to_left <= to_above) & (to_left <= to_corner), left, best)
        return best.astype(np.uint8)

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self.file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


class TiffWriter(RowWriter):
    """TIFF of 8 or 16 bits in strips, differences of neighbours compressed by Deflate.

    The directory stands in front of the strips: first with zeros, at the end with their places.
    """

    BYTE_LIMIT = 2**32 - 1

    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        super().__init__(file, layout)
        self._pending = np.zeros((0, layout.width, layout.channels), f"<u{layout.depth // 8}")
        self._offsets: list[int] = []
        self._counts: list[int] = []
        self._directory = self._make_directory()
        file.write(b"II*\0" + struct.pack("<I", 8))
        self._write_directory()
        self._start = file.tell()

    def write(self, rows: np.ndarray) -> None:
        self._pending = np.concatenate([self._pending, rows.astype(self._pending.dtype)])
        while len(self._pending) >= _STRIP:
            self._write_strip(self._pending[:_STRIP])
            self._pending = self._pending[_STRIP:]

    def finish(self) -> None:
        if len(self._pending):
            self._write_strip(self._pending)
        # Pillow adds the end of the directory to every offset.
        self._directory[TiffImagePlugin.STRIPOFFSETS] = tuple(offset - self._start for offset in self._offsets)
        self._directory[TiffImagePlugin.STRIPBYTECOUNTS] = tuple(self._counts)
        self.file.seek(8)
        self._write_directory()
        assert self.file.tell() == self._start

    def _write_strip(self, rows: np.ndarray) -> None:
        differences = rows.copy()
        differences[:, 1:] -= rows[:, :-1]
        data = zlib.compress(differences.tobytes(), 6)
        if self.file.tell() + len(data) > self.BYTE_LIMIT:
            raise DataError("a tif file ends at 4 GB", fix="use --format png, or enlarge it less")
        self._offsets.append(self.file.tell())
        self._counts.append(len(data))
        self.file.write(data)

    def _write_directory(self) -> None:
        self.file.write(self._directory.tobytes(8))

    def _make_directory(self) -> TiffImagePlugin.ImageFileDirectory_v2:
        layout, strips = self.layout, -(-self.layout.height // _STRIP)
        directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\0\0\0\0")
        for tag, value in (layout.exif or {}).items():
            directory[tag] = value
        directory[TiffImagePlugin.IMAGEWIDTH] = layout.width
        directory[TiffImagePlugin.IMAGELENGTH] = layout.height
        directory[TiffImagePlugin.BITSPERSAMPLE] = (layout.depth,) * layout.channels
        directory[TiffImagePlugin.COMPRESSION] = 8
        directory[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 1 if layout.channels < 3 else 2
        directory[TiffImagePlugin.SAMPLESPERPIXEL] = layout.channels
        directory[TiffImagePlugin.ROWSPERSTRIP] = _STRIP
        directory[TiffImagePlugin.PREDICTOR] = 2
        if layout.channels in (2, 4):
            directory[TiffImagePlugin.EXTRASAMPLES] = 2
        if layout.icc_profile:
            directory[TiffImagePlugin.ICCPROFILE] = layout.icc_profile
        for tag in (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.STRIPBYTECOUNTS):
            directory.tagtype[tag] = 4
            directory[tag] = (0,) * strips
        return directory


class PillowWriter(RowWriter):
    """JPEG or WebP by Pillow, when all rows have come."""

    def __init__(self, file: BinaryIO, layout: Layout, pillow_format: str, quality: int, temporary: Path) -> None:
        super().__init__(file, layout)
        self._format = pillow_format
        self._quality = quality
        path = temporary.with_suffix(".rows")
        # Without a name, so that nothing is left behind however the process ends.
        self._rows = path.open("w+b")
        path.unlink()

    def write(self, rows: np.ndarray) -> None:
        self._rows.write(rows.tobytes())

    def finish(self) -> None:
        options: dict[str, object] = {"quality": self._quality, "icc_profile": self.layout.icc_profile}
        if exif := self.layout.exif_bytes():
            options["exif"] = b"Exif\0\0" + exif
        if self._format == "JPEG":
            options["subsampling"] = 0
        else:
            options["lossless"] = self._quality == 100
        self._picture().save(self.file, self._format, **options)

    def close(self) -> None:
        self._rows.close()

    def _picture(self) -> Image.Image:
        layout = self.layout
        self._rows.seek(0)
        picture = Image.new(layout.mode, (layout.width, layout.height))
        for top in range(0, layout.height, _STRIP):
            count = min(_STRIP, layout.height - top)
            data = self._rows.read(count * layout.width * layout.channels)
            picture.paste(Image.frombytes(layout.mode, (layout.width, count), data), (0, top))
        return picture

"""Images that have not been read yet: files, cells of tables, bytes and pixels in memory."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import UInt8
from torch import Tensor

from refreward_trl.data.images import decode_image, read_image, read_size, to_pil
from refreward_trl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


class ImageSource(Protocol):
    """One image that has not been read yet."""

    @property
    def where(self) -> str:
        """Names the image in errors: a file, or a row and column."""
        ...

    def size(self) -> tuple[int, int]:
        """Returns (height, width) from the header."""
        ...

    def read(self) -> UInt8[Tensor, "3 H W"]:
        """Decodes the image."""
        ...

    def encoded(self) -> bytes:
        """Returns the image as the bytes of a file: those that it is stored in, or a PNG."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """An image file."""

    path: Path

    @property
    def where(self) -> str:
        return str(self.path)

    def size(self) -> tuple[int, int]:
        return read_size(self.path)

    def read(self) -> UInt8[Tensor, "3 H W"]:
        return read_image(self.path)

    def encoded(self) -> bytes:
        try:
            return self.path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise DataError(f"the file cannot be read: {error}", where=self.where) from error


@dataclass(frozen=True)
class ImageBytes:
    """The bytes of an image file, held in memory; `where` names them in errors."""

    content: bytes
    where: str = "image in memory"

    def size(self) -> tuple[int, int]:
        return read_size(self.content, where=self.where)

    def read(self) -> UInt8[Tensor, "3 H W"]:
        return decode_image(self.content, where=self.where)

    def encoded(self) -> bytes:
        return self.content


@dataclass(frozen=True, eq=False)
class ImageTensor:
    """Pixels held in memory, uint8 `(3, H, W)`; `where` names them in errors."""

    image: Tensor
    where: str = "image in memory"

    def size(self) -> tuple[int, int]:
        return int(self.image.shape[-2]), int(self.image.shape[-1])

    def read(self) -> UInt8[Tensor, "3 H W"]:
        return self.image

    def encoded(self) -> bytes:
        buffer = io.BytesIO()
        to_pil(self.image).save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True)
class ImageCell:
    """An image in a Hugging Face dataset; `table` holds that one column, undecoded, as `{"bytes", "path"}`.

    Attributes:
        position: Place in the cell's list, in a column of lists of images; `table` is then in the arrow format.
    """

    table: Dataset
    dataset: str
    column: str
    row: int
    position: int | None = None

    @property
    def where(self) -> str:
        place = "" if self.position is None else f"[{self.position}]"
        return f"{self.dataset}: row {self.row}, column {self.column}{place}"

    def size(self) -> tuple[int, int]:
        return read_size(self._content(), where=self.where)

    def read(self) -> UInt8[Tensor, "3 H W"]:
        content = self._content()
        return decode_image(content, where=self.where) if isinstance(content, bytes) else read_image(content)

    def encoded(self) -> bytes:
        content = self._content()
        return content if isinstance(content, bytes) else ImageFile(content).encoded()

    def _content(self) -> bytes | Path:
        cell = self._cell()
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise DataError("the cell is empty", where=self.where, fix="fill it, or drop the row")
        if cell["bytes"] is not None:
            return cell["bytes"]
        check_path(cell["path"], self.dataset, self.where)
        return Path(cell["path"])

    def _cell(self) -> dict[str, Any] | None:
        if self.position is None:
            return self.table[self.row][self.column]
        # Of a list of images, one alone is copied.
        part: Any = self.table[self.row : self.row + 1]
        cell = part.column(0)[0][self.position].as_py()
        return {"bytes": cell, "path": None} if isinstance(cell, bytes) else cell


def check_path(path: str, dataset: str, where: str) -> None:
    """Raises `DataError` if a cell's path leads out of its dataset. A link inside that leads out is the user's own."""
    root = Path(dataset).parent if Path(dataset).is_file() else Path(dataset)
    if "\0" in path or not any(
        as_seen(path).startswith(as_seen(root) + os.sep) for as_seen in (os.path.abspath, os.path.realpath)
    ):
        raise DataError(
            f"the path {path} leads out of the dataset".replace("\0", "\\0"),
            where=where,
            fix="store the images themselves",
        )

"""Strict image reading: what cannot be read without guessing is refused, with its name and the reason."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile

from refreward_trl.data.images import (
    decode_image,
    from_pil,
    list_images,
    read_image,
    read_size,
    to_float,
    to_pil,
    to_uint8,
    write_png,
)
from refreward_trl.errors import DataError, SetupError


def photo(width: int = 48, height: int = 32) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that only claims its size: signature, IHDR and an empty end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def transparent(mode: str) -> Image.Image:
    image = photo().convert("RGBA")
    image.putpixel((3, 3), (1, 2, 3, 200))
    return image.convert(mode)


def palette_with_a_hole() -> bytes:
    return encoded(photo().convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=0)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


FRAMES = [photo(), photo().rotate(180)]

BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "0 bytes"),
    "header_only.png": (lambda: encoded(photo(), "PNG")[:20], "damaged|not a readable"),
    "hundred_bytes.png": (lambda: encoded(photo(), "PNG")[:100], "damaged or truncated"),
    "half.png": (lambda: half(encoded(photo(), "PNG")), "damaged or truncated"),
    "half.jpg": (lambda: half(encoded(photo(), "JPEG")), "damaged or truncated"),
    "half.webp": (lambda: half(encoded(photo(), "WEBP")), "damaged or truncated|not a readable"),
    "half.tif": (lambda: half(encoded(photo(), "TIFF")), "damaged or truncated|not a readable"),
    "half.bmp": (lambda: half(encoded(photo(), "BMP")), "damaged or truncated"),
    "flipped_bit.png": (lambda: flip_byte(encoded(photo(), "PNG"), 200), "damaged or truncated"),
    "page.jpg": (lambda: b"\n<!DOCTYPE html><html>404</html>", "HTML"),
    "error.png": (lambda: b'{"error": "rate limit"}', "JSON"),
    "vector.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "XML"),
    "pointer.png": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    "text.png": (lambda: b"hello, I am not an image", "not a readable"),
    "gif.png": (lambda: encoded(photo(), "GIF"), "not a readable"),
    "postscript.jpg": (lambda: encoded(photo(), "EPS"), "not a readable"),
    "zeros.jpg": (lambda: bytes(1000), "not a readable"),
    "bomb.png": (lambda: png_header(30_000, 30_000), "too many pixels|above the limit"),
    "large.png": (lambda: png_header(9000, 9000), "above the limit"),
    "cmyk.jpg": (lambda: encoded(photo().convert("CMYK"), "JPEG"), "CMYK"),
    "cmyk.tif": (lambda: encoded(photo().convert("CMYK"), "TIFF"), "CMYK"),
    "lab.tif": (lambda: encoded(Image.new("LAB", (8, 8)), "TIFF"), "'LAB'"),
    "float.tif": (lambda: encoded(Image.new("F", (8, 8)), "TIFF"), "'F'"),
    "int32.tif": (lambda: encoded(Image.new("I", (8, 8)), "TIFF"), "'I'"),
    "alpha.png": (lambda: encoded(transparent("RGBA"), "PNG"), "partly transparent"),
    "grey_alpha.png": (lambda: encoded(transparent("LA"), "PNG"), "partly transparent"),
    "alpha.webp": (lambda: encoded(transparent("RGBA"), "WEBP", lossless=True), "partly transparent"),
    "palette_alpha.png": (palette_with_a_hole, "partly transparent"),
    "animated.png": (lambda: encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "animated"),
    "animated.webp": (lambda: encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "animated"),
    "pages.tif": (lambda: encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "several pages"),
}


def flip_byte(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    make, reason = BAD[name]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(DataError, match=reason) as caught:
        read_image(path)
    assert caught.value.where == str(path)
    assert caught.value.fix


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_are_refused_by_row_and_column(name: str) -> None:
    make, reason = BAD[name]
    with pytest.raises(DataError, match=reason) as caught:
        decode_image(make(), where="row 7, column hr_image")
    assert caught.value.where == "row 7, column hr_image"


def test_missing_files_and_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        read_image(tmp_path / "gone.png")
    assert "gone.png" in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_image("nul\0byte.png")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_good_files_are_read_whatever_their_suffix(image_format: str, tmp_path: Path) -> None:
    path = tmp_path / "any.jpg"
    path.write_bytes(encoded(photo(), image_format))
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 48) and image.is_contiguous()
    if image_format in ("PNG", "TIFF", "BMP"):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(photo()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, image_format: str, tmp_path: Path) -> None:
    upright = Image.new("RGB", (64, 32), "black")
    upright.paste((255, 0, 0), (0, 0, 32, 16))  # red upper left quarter
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "photo"
    path.write_bytes(encoded(stored, image_format, exif=exif))
    image = read_image(path)
    assert image.shape == (3, 32, 64)
    assert image[0, :14, :30].min() > 200 and image[0, 18:].max() < 60 and image[0, :, 34:].max() < 60
    assert read_size(path) == (32, 64)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x05\0ab"]
)
def test_broken_exif_is_ignored(exif: bytes) -> None:
    data = encoded(photo(), "JPEG", exif=exif)
    assert read_bytes(data).shape == (3, 32, 48) and read_size(data) == (32, 48)


def test_grey_palette_and_opaque_alpha_become_rgb(tmp_path: Path) -> None:
    rgb = np.asarray(photo())
    grey = read_bytes(encoded(photo().convert("L"), "PNG"))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    assert np.array_equal(read_bytes(encoded(photo().convert("RGBA"), "PNG")), rgb.transpose(2, 0, 1))
    assert np.array_equal(read_bytes(encoded(photo().convert("RGBA"), "WEBP", lossless=True)), rgb.transpose(2, 0, 1))
    palette = photo().convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(read_bytes(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    assert set(read_bytes(encoded(photo().convert("1"), "PNG")).unique().tolist()) == {0, 255}


def read_bytes(data: bytes) -> torch.Tensor:
    return decode_image(data, where="test")


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_rounded_to_eight(image_format: str) -> None:
    values = np.array([[0, 127, 128, 129], [257, 32768, 65534, 65535]], dtype=np.uint16)
    image = read_bytes(encoded(Image.fromarray(values), image_format))
    assert image[0].tolist() == image[2].tolist() == [[0, 0, 0, 1], [1, 128, 255, 255]]


def test_a_multi_picture_jpeg_gives_its_main_picture() -> None:
    other = Image.new("RGB", (24, 16))
    image = read_bytes(encoded(photo(), "MPO", save_all=True, append_images=[other]))
    assert image.shape == (3, 32, 48)


def test_the_pixel_limit_is_explicit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    photo().save(path)
    with pytest.raises(DataError, match="48x32 = 1536 pixels is above the limit of 1535"):
        read_image(path, max_pixels=1535)
    with pytest.raises(DataError, match="above the limit"):
        read_size(path, max_pixels=1535)
    assert read_image(path, max_pixels=1536).shape == (3, 32, 48)


def test_truncated_loading_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    photo().save(path)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(SetupError, match="LOAD_TRUNCATED_IMAGES"):
        read_image(path)


@pytest.mark.parametrize("name", ["cmyk.jpg", "animated.webp", "large.png", "float.tif", "empty.png", "page.jpg"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_headers_show_most_refusals(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(BAD[name][0]())
    with pytest.raises(DataError, match=BAD[name][1]):
        read_size(path)
    with pytest.raises(DataError, match=BAD[name][1]):
        read_size(BAD[name][0](), where="row 1")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (transparent("RGBA"), "partly transparent"),
        (photo().convert("CMYK"), "CMYK"),
        (Image.new("F", (8, 8)), "'F'"),
        (Image.open(io.BytesIO(BAD["animated.webp"][0]())), "animated"),
        (Image.open(io.BytesIO(BAD["half.jpg"][0]())), "damaged or truncated"),
        (Image.new("1", (9000, 9000)), "above the limit"),
    ],
    ids=["alpha", "cmyk", "float", "animated", "half", "large"],
)
def test_pil_images_follow_the_same_rules(image: Image.Image, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        from_pil(image, where="completion 3")
    assert caught.value.where == "completion 3"


def test_uint8_survives_every_conversion() -> None:
    image = torch.arange(256, dtype=torch.uint8).repeat(3).view(3, 16, 16)
    assert torch.equal(to_uint8(to_float(image)), image)
    assert torch.equal(from_pil(to_pil(image)), image)
    assert torch.equal(from_pil(to_pil(to_float(image))), image)
    assert to_float(image).max() == 1 and to_float(image).dtype == torch.float32


def test_to_uint8_rounds_and_clamps() -> None:
    values = torch.tensor([-0.5, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 1.7])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_uint8(values.double()).tolist() == to_uint8(values).tolist()


def test_to_float_keeps_the_graph() -> None:
    image = torch.rand(3, 4, 4, requires_grad=True)
    assert to_float(image).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_pixels_never_become_black(value: float, tmp_path: Path) -> None:
    image = torch.full((3, 4, 4), 0.5)
    image[1, 2, 3] = value
    for use in (to_uint8, to_pil, lambda x: write_png(tmp_path / "x.png", x)):
        with pytest.raises(DataError, match="NaN or infinite"):
            use(image)
    assert not list(tmp_path.iterdir())


def test_to_pil_names_wrong_shapes() -> None:
    with pytest.raises(DataError, match=r"\(1, 3, 4, 4\)"):
        to_pil(torch.zeros(1, 3, 4, 4))


def test_write_png_round_trip_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "new" / "folder" / "a.png"
    for _ in range(2):  # the second time it is replaced
        write_png(path, image)
    assert torch.equal(read_image(path), image)
    assert list(path.parent.iterdir()) == [path]


def test_write_png_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    write_png(path, torch.zeros(3, 4, 4))
    old = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SetupError, match="No space left") as caught:
        write_png(path, torch.ones(3, 4, 4))
    assert str(path) in str(caught.value)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_list_images_is_sorted_and_ignores_strays(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.webp", ".hidden.png", "._a.jpg", "notes.txt", "x.csv", "z/d.tiff", ".git/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "c.webp"]
    assert [path.name for path in list_images(str(tmp_path), recursive=True)] == ["a.jpg", "b.PNG", "c.webp", "d.tiff"]


def test_list_images_names_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list_images(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a folder"):
        list_images(tmp_path / "file")

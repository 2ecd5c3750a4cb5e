"""Pictures are read and written as they are: depth, grey, alpha, colour profile, EXIF data."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from refreward_trl.data.picture_writers import Layout, PillowWriter, check_layout, open_writer
from refreward_trl.data.pictures import Picture, read_picture
from refreward_trl.errors import DataError, SetupError

KINDS = ("png", "tif", "jpg", "webp")


def values(channels: int, depth: int = 8, height: int = 150, width: int = 70) -> np.ndarray:
    """Smooth enough for JPEG, with every byte of 16 bits in use."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [np.sin(x / 9 + index) * np.cos(y / (7 + index)) / 2.1 + 0.5 for index in range(channels)]
    return (np.stack(planes, -1) * (2**depth - 1)).astype(np.uint16 if depth == 16 else np.uint8)


def write(path: Path, pixels: np.ndarray, *, strips: int = 37, **extra) -> Path:
    layout = Layout(pixels.shape[0], pixels.shape[1], pixels.shape[2], pixels.dtype.itemsize * 8, **extra)
    with open_writer(path, path.suffix[1:], layout, quality=95) as writer:
        for top in range(0, len(pixels), strips):
            writer.write(pixels[top : top + strips])
    return path


def together(picture: Picture) -> np.ndarray:
    return picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])


def exif_of_a_phone(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ISOSpeedRatings: 200, ExifTags.Base.ExifImageWidth: 30}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    return exif


@pytest.mark.parametrize("strips", [1, 37, 64, 150])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("kind", "depth"), [("png", 8), ("png", 16), ("tif", 8), ("tif", 16)])
def test_lossless_formats_keep_every_value(kind, depth, channels, strips, tmp_path):
    pixels = values(channels, depth)
    assert np.array_equal(together(read_picture(write(tmp_path / f"a.{kind}", pixels, strips=strips))), pixels)


@pytest.mark.parametrize("depth", [8, 16])
def test_grey_with_alpha_is_kept_by_png(depth, tmp_path):
    pixels = values(2, depth)
    assert np.array_equal(together(read_picture(write(tmp_path / "a.png", pixels))), pixels)


@pytest.mark.parametrize(("kind", "channels"), [("jpg", 1), ("jpg", 3), ("webp", 3), ("webp", 4)])
def test_lossy_formats_come_near(kind, channels, tmp_path):
    pixels = values(channels)
    found = together(read_picture(write(tmp_path / f"a.{kind}", pixels)))
    assert found.shape == pixels.shape
    assert np.abs(found.astype(int) - pixels).mean() < 3


def test_what_pillow_writes_compresses_no_better_than_a_tenth_less(tmp_path):
    pixels = values(3, height=256, width=256)
    mine = write(tmp_path / "a.png", pixels).stat().st_size
    Image.fromarray(pixels).save(tmp_path / "b.png")
    assert mine < 1.1 * (tmp_path / "b.png").stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_profile_and_exif_survive_and_the_orientation_is_upright(kind, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = tmp_path / "source.jpg"
    Image.fromarray(values(3)).save(source, exif=exif_of_a_phone(), icc_profile=profile)
    picture = read_picture(source)
    assert picture.size == (70, 150)
    assert picture.icc_profile == profile
    path = write(tmp_path / f"a.{kind}", picture.pixels, icc_profile=profile, exif=picture.exif)
    with Image.open(path) as image:
        exif = image.getexif()
        assert image.size == (150, 70)
        assert image.info["icc_profile"] == profile
        assert exif[ExifTags.Base.Orientation] == 1 and exif[ExifTags.Base.Make] == "Maker"
        assert exif.get_ifd(ExifTags.IFD.Exif) == {ExifTags.Base.ISOSpeedRatings: 200}
        assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
    assert np.array_equal(picture.pixels.shape, read_picture(path).pixels.shape)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(orientation, tmp_path):
    path = tmp_path / "a.png"
    upright = values(3)
    Image.fromarray(upright).save(path, exif=exif_of_a_phone(orientation))
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright[::-1].transpose(1, 0, 2),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[::-1],
    }
    assert np.array_equal(read_picture(path).pixels, turned[orientation])


def test_deep_colour_is_turned_with_both_its_bytes(tmp_path):
    pixels = values(3, 16)
    path = write(tmp_path / "a.png", pixels, exif=exif_of_a_phone(6))
    assert np.array_equal(read_picture(path).pixels, pixels[::-1].transpose(1, 0, 2))


@pytest.mark.parametrize(("mode", "shape", "alpha"), [
    ("1", 1, False),
    ("L", 1, False),
    ("LA", 1, True),
    ("P", 3, False),
    ("RGB", 3, False),
    ("RGBA", 3, True),
    ("I;16", 1, False),
])  # fmt: skip
def test_every_mode_has_its_channels(mode, shape, alpha, tmp_path):
    image = Image.fromarray(values(1)[..., 0]) if mode in ("1", "L", "LA") else Image.fromarray(values(3))
    image = Image.fromarray(values(1, 16)[..., 0]) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert picture.pixels.shape == (150, 70, shape) and (picture.alpha is not None) is alpha
    assert picture.largest == (65535 if mode == "I;16" else 255)
    if mode in ("L", "RGB", "I;16"):
        assert np.array_equal(np.asarray(image), picture.pixels.squeeze())


def test_a_colour_that_stands_for_transparency_becomes_alpha(tmp_path):
    palette = Image.fromarray(values(3)).convert("P")
    index = palette.getpixel((5, 5))
    palette.save(tmp_path / "p.png", transparency=index)
    picture = read_picture(tmp_path / "p.png")
    assert picture.alpha is not None
    assert np.array_equal(picture.alpha == 0, np.asarray(palette) == index)
    grey = Image.fromarray(values(1)[..., 0])
    grey.save(tmp_path / "l.png", transparency=100)
    picture = read_picture(tmp_path / "l.png")
    assert picture.alpha is not None and picture.pixels.shape[2] == 1
    assert np.array_equal(picture.alpha == 0, np.asarray(grey) == 100)
    assert np.array_equal(picture.pixels[..., 0], np.asarray(grey))
    deep = Image.fromarray(values(1, 16)[..., 0])
    key = deep.getpixel((3, 3))
    deep.save(tmp_path / "i.png", transparency=key)
    picture = read_picture(tmp_path / "i.png")
    assert picture.alpha is not None and np.array_equal(picture.alpha == 0, np.asarray(deep) == key)


def test_big_endian_tiffs_are_read_with_both_bytes(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pixels = values(3, 16)
    for byteorder in "<>":
        for compression in (None, "zlib"):
            tifffile.imwrite(
                tmp_path / "a.tif", pixels, byteorder=byteorder, compression=compression, photometric="rgb"
            )
            assert np.array_equal(read_picture(tmp_path / "a.tif").pixels, pixels), (byteorder, compression)


def test_what_we_write_as_tiff_others_read(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for depth in (8, 16):
        for channels in (1, 2, 3, 4):
            pixels = values(channels, depth)
            found = tifffile.imread(write(tmp_path / "a.tif", pixels))
            assert np.array_equal(found.reshape(pixels.shape), pixels)


def test_planes_of_deep_colour_are_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    planes = np.ascontiguousarray(values(3, 16).transpose(2, 0, 1))
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
    with pytest.raises(DataError, match=r"a\.tif"):
        read_picture(tmp_path / "a.tif")


def test_deep_colour_with_a_transparent_value_is_refused(tmp_path):
    path = write(tmp_path / "a.png", values(3, 16))
    data = path.read_bytes()
    key = b"tRNS" + struct.pack(">HHH", 1, 2, 3)
    chunk = struct.pack(">I", 6) + key + struct.pack(">I", zlib.crc32(key))
    place = data.index(b"IDAT") - 4
    path.write_bytes(data[:place] + chunk + data[place:])
    with pytest.raises(DataError, match="16-bit colour in a form"):
        read_picture(path)


def test_cmyk_and_floats_are_refused_by_name(tmp_path):
    Image.fromarray(values(3)).convert("CMYK").save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="CMYK") as caught:
        read_picture(tmp_path / "a.jpg")
    assert caught.value.where == str(tmp_path / "a.jpg")
    Image.fromarray(values(1)[..., 0].astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match="pixel type 'F'"):
        read_picture(tmp_path / "f.tif")


@pytest.mark.parametrize("depth", [8, 16])
def test_a_truncated_file_is_refused(depth, tmp_path):
    path = write(tmp_path / "a.png", values(3, depth))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match="truncated"):
        read_picture(path)


@pytest.mark.parametrize(
    ("kind", "layout", "message"),
    [
        ("webp", Layout(10, 16384, 3), "16383"),
        ("jpg", Layout(65501, 10, 3), "65500"),
        ("jpg", Layout(10, 10, 4), "transparent"),
        ("jpg", Layout(10, 10, 3, 16), "8 bits"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_it_is_computed(kind, layout, message):
    with pytest.raises(DataError, match=message):
        check_layout(kind, layout, "a")


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_leaves_no_file_and_the_old_one(kind, tmp_path):
    path = write(tmp_path / f"a.{kind}", values(3))
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), open_writer(path, kind, Layout(150, 70, 3), quality=95) as writer:
        writer.write(values(3)[:80])
        raise ZeroDivisionError
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named(tmp_path):
    with (
        pytest.raises(SetupError, match="disk is full"),
        open_writer(tmp_path / "a.png", "png", Layout(1, 1, 3), quality=95),
    ):
        raise OSError(28, "No space left on device")


def test_waiting_rows_take_no_memory(tmp_path):
    with open_writer(tmp_path / "a.jpg", "jpg", Layout(150, 70, 3), quality=95) as writer:
        writer.write(values(3))
        assert isinstance(writer, PillowWriter) and writer._rows.tell() == 150 * 70 * 3
        # Nothing has a name but the output to be.
        assert len(list(tmp_path.iterdir())) == 1

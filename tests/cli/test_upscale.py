"""`refreward upscale`: odd images, folders, failures, memory that ends, and what the manifest says about them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from refreward_trl.cli import app, upscale_run
from refreward_trl.cli.upscale_jobs import find_jobs
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.generators.tiny import build_tiny_generator

NETWORK = """
import torch, torch.nn.functional as F

LIMIT = [10**9]

class Bicubic(torch.nn.Module):
    def forward(self, lr_image):
        if lr_image[0, 0].numel() > LIMIT[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        if lr_image.shape[-1] == 13:
            raise ValueError("13 brings bad luck")
        return F.interpolate(lr_image, scale_factor=4, mode="bicubic", align_corners=False)
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working folder, which holds a network that enlarges by bicubic."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_upscaler", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_upscaler.py").write_text(NETWORK)
    return tmp_path


def photo(height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    planes = [np.sin(x / 5 + index) * np.cos(y / 4) * 120 + 128 for index in range(channels)]
    return np.stack(planes, -1).astype(np.uint8).squeeze()


def save(path: Path, pixels: np.ndarray | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo() if pixels is None else pixels).save(path, **options)
    return path


def upscale(*words: object, generator: str = "my_upscaler:Bicubic") -> int:
    return app.main(["upscale", *map(str, words), "--generator", generator])


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def odd_images(folder: Path) -> None:
    """Every kind of image that people have been seen to have."""
    save(folder / "one.png", np.full((1, 1, 3), 77, np.uint8))
    save(folder / "thin.png", photo(7, 5000))
    save(folder / "grey.png", photo(channels=1))
    save(folder / "grey alpha ünï.png", photo(channels=2))
    save(folder / "rgba.png", photo(channels=4))
    save(folder / "grey16.png", photo(channels=1).astype(np.uint16) * 257)
    save(folder / "grey16.tif", photo(channels=1).astype(np.uint16) * 257)
    save(folder / "shouting.JPG", quality=90)
    save(folder / "photo.webp")
    save(folder / "old.bmp")
    Image.fromarray(photo()).convert("P").save(folder / "palette.png", transparency=3)
    Image.fromarray(photo(channels=1)).convert("1").save(folder / "bilevel.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(folder / "rotated.jpg", exif=exif, icc_profile=profile)
    (folder / "link.png").symlink_to(folder / "grey.png")
    Image.fromarray(photo()).convert("CMYK").save(folder / "bad_cmyk.jpg")
    frames = [Image.fromarray(photo()), Image.fromarray(255 - photo())]
    for name in ("bad_animated.gif", "bad_animated.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    whole = save(folder / "bad_truncated.png").read_bytes()
    (folder / "bad_truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "bad_empty.png").touch()
    (folder / "bad_text.png").write_text("<!DOCTYPE html> not found")
    (folder / "bad_bomb.png").write_bytes(bomb())
    (folder / "bad_link.png").symlink_to(folder / "nowhere.png")
    (folder / "notes.txt").write_text("no image")


def test_odd_images_in_one_run_come_out_or_are_refused_by_name(here, capsys):
    odd_images(here / "in")
    assert upscale("in", "out", "--json", "manifest.json") == 3
    entries = {Path(entry["input"]).name: entry for entry in json.loads(Path("manifest.json").read_text())["images"]}
    failed = {name for name, entry in entries.items() if entry["status"] == "failed"}
    assert failed == {name for name in entries if name.startswith("bad_")} and len(failed) == 8
    shown = capsys.readouterr().err
    for name in failed:
        error = entries[name]["error"]
        assert name in error["where"] and error["what"] and name in shown and error["what"] in shown
        assert not (here / "out" / name).exists()
    good = {name: opened(Path(entry["output"])) for name, entry in entries.items() if name not in failed}
    assert len(good) == 14 == len(list((here / "out").iterdir()))
    for name, image in good.items():
        with Image.open(here / "in" / name) as source:
            size = source.size[::-1] if name == "rotated.jpg" else source.size
        assert image.size == (4 * size[0], 4 * size[1]) == tuple(entries[name]["size_out"]), name
        assert entries[name]["size_in"] == list(size)
    modes = {name: image.mode for name, image in good.items()}
    assert modes.pop("grey16.png") == modes.pop("grey16.tif") == "I;16"
    for name in ("grey.png", "bilevel.png", "link.png"):
        assert modes.pop(name) == "L"
    assert modes.pop("grey alpha ünï.png") == "LA"
    assert modes.pop("rgba.png") == modes.pop("palette.png") == "RGBA"
    assert set(modes.values()) == {"RGB"}
    assert good["rotated.jpg"].getexif()[ExifTags.Base.Orientation] == 1
    assert good["rotated.jpg"].info["icc_profile"]
    assert np.all(np.asarray(good["one.png"]) == 77)


def test_values_are_those_of_the_network(here):
    save(Path("a.png"))
    save(Path("g.png"), photo(channels=1).astype(np.uint16) * 257)
    assert upscale("a.png", "b.png") == 0 == upscale("g.png", "h.png")
    low = torch.from_numpy(photo()).permute(2, 0, 1)[None] / 255
    high = torch.nn.functional.interpolate(low, scale_factor=4, mode="bicubic").clamp(0, 1)
    assert np.array_equal(np.asarray(opened(Path("b.png"))), (high * 255).round()[0].permute(1, 2, 0).numpy())
    deep = torch.nn.functional.interpolate(low[:, :1], scale_factor=4, mode="bicubic").clamp(0, 1)
    found = np.asarray(opened(Path("h.png"))).astype(int)
    assert np.abs(found - (deep * 65535).round()[0, 0].numpy()).max() <= 1


def test_alpha_is_enlarged_and_what_is_clear_or_opaque_stays(here):
    pixels = photo(channels=4)
    pixels[..., 3] = 0
    pixels[:, 16:, 3] = 255
    save(Path("a.png"), pixels)
    pixels[..., 3] = 0
    save(Path("clear.png"), pixels)
    assert upscale("a.png", "b.png", "--tile", 64) == 0 == upscale("clear.png", "c.webp")
    alpha = np.asarray(opened(Path("b.png")))[..., 3]
    assert np.all(alpha[:, :62] == 0) and np.all(alpha[:, 66:] == 255)
    assert 0 < alpha[0, 63] < alpha[0, 64] < 255
    assert np.all(np.asarray(opened(Path("c.webp")))[..., 3] == 0)


@pytest.mark.parametrize("scale", [1, 1.5, 2, 3.3, 4, 7, 8])
def test_any_scale_has_exactly_the_rounded_size(scale, here):
    save(Path("a.png"), photo(23, 31, 4))
    assert upscale("a.png", "b.png", "--scale", scale, "--tile", 64) == 0
    image = opened(Path("b.png"))
    assert image.size == (round(31 * scale), round(23 * scale))
    expected = Image.fromarray(photo(23, 31, 3)).resize(image.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(image)[..., :3].astype(int) - np.asarray(expected)).mean() < 3


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
def test_the_format_can_be_chosen(kind, here):
    save(Path("in/a.png"))
    assert upscale("in", "out", "--format", kind, "--tile", 64) == 0
    image = opened(Path("out") / f"a.{kind}")
    assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tif": "TIFF"}[kind]
    expected = Image.fromarray(photo()).resize(image.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 3


def test_a_format_without_alpha_takes_what_is_opaque_and_refuses_the_rest(here, capsys):
    pixels = photo(channels=4)
    pixels[..., 3] = 255
    save(Path("in/opaque.png"), pixels)
    save(Path("in/partly.png"), photo(channels=4))
    assert upscale("in", "out", "--format", "jpg") == 3
    assert "partly.jpg: the image is partly transparent" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["opaque.jpg"]


def test_the_default_generator_is_really_run(here):
    save(Path("a.png"))
    assert upscale("a.png", "b.png", generator="default") == 0
    from refreward_trl.generators import load_generator

    low = torch.from_numpy(photo()).permute(2, 0, 1)[None] / 255
    expected = (load_generator("default").generate(low) * 255).round()[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(opened(Path("b.png"))), expected)


@pytest.mark.parametrize(
    "options", [["--color-fix", "adain"], ["--seed", 3, "--batch-size", 4], ["--dtype", "bfloat16"]]
)
def test_a_saved_generator_in_tiles(options, here):
    generator = build_tiny_generator(vae_width=8, unet_channels=(8, 16), input_noise=0.3, color_fix="wavelet")
    generator.save_pretrained("generator")
    save(Path("a.png"))
    words = ["a.png", "b.png", "--tile", 64, "--overlap", 16, "--json", "m.json"]
    assert upscale(*words, generator="generator") == 0
    plain = np.asarray(opened(Path("b.png"))).astype(int)
    assert plain.shape == (96, 128, 3)
    assert upscale(*words, *options, generator="generator") == 0
    other = np.asarray(opened(Path("b.png"))).astype(int)
    assert 0 < np.abs(other - plain).mean() < 60
    settings = json.loads(Path("m.json").read_text())["settings"]
    assert settings["tile"] == 64 and settings["color_fix"] == ("adain" if "adain" in options else "wavelet")


def test_what_a_published_checkpoint_needs_reaches_its_loader(here):
    with mock.patch("refreward_trl.generators.load_generator", side_effect=ConfigError("seen")) as load:
        save(Path("a.png"))
        words = ["--family", "naosd", "--base-model", "sd21", "--dtype", "float16"]
        assert upscale("a.png", "b.png", *words, generator="merged") == 2
    load.assert_called_once_with("merged", dtype=torch.float16, family="naosd", base_model="sd21")


def test_memory_that_ends_halves_the_tiles_of_this_and_the_next_images(here, capsys):
    save(Path("in/a.png"), photo(70, 70))
    save(Path("in/b.png"), photo(70, 70))
    save(Path("in/c.png"), photo(9, 9))
    import my_upscaler  # pyright: ignore[reportMissingImports]

    my_upscaler.LIMIT[0] = 40 * 40
    assert upscale("in", "out", "--tile", 256, "--json", "m.json") == 0
    assert [entry["tile"] for entry in json.loads(Path("m.json").read_text())["images"]] == [128, 128, 128]
    assert "3 done of 3 images" in capsys.readouterr().out
    assert opened(Path("out/a.png")).size == (280, 280)


def test_what_never_fits_fails_alone_and_leaves_the_tiles_of_the_others(here, capsys):
    save(Path("in/a.png"), photo(70, 70))
    save(Path("in/b.png"), photo(9, 9))
    import my_upscaler  # pyright: ignore[reportMissingImports]

    my_upscaler.LIMIT[0] = 10 * 10
    assert upscale("in", "out", "--tile", 256, "--json", "m.json") == 3
    first, second = json.loads(Path("m.json").read_text())["images"]
    assert "even in tiles of 64 pixels" in first["error"]["what"] and "a.png" in first["error"]["where"]
    assert second["status"] == "done" and second["tile"] == 256
    assert [path.name for path in Path("out").iterdir()] == ["b.png"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert upscale_run.is_out_of_memory(error) is expected


def test_whatever_the_network_raises_fails_one_image(here, capsys):
    save(Path("in/a.png"), photo(9, 13))
    save(Path("in/b.png"), photo(9, 12))
    assert upscale("in", "out") == 3
    shown = capsys.readouterr()
    assert "a.png: ValueError: 13 brings bad luck" in shown.err and "1 of 2 images failed" in shown.err
    assert "1 done, 1 failed of 2 images" in shown.out
    assert upscale("in/a.png", "out", "--debug") == 3
    assert "Traceback" in capsys.readouterr().err


def test_what_exists_is_skipped_only_when_asked(here, capsys):
    save(Path("in/a.png"))
    save(Path("out/a.png"), photo(3, 3))
    assert upscale("in", "out", "--skip-existing", "--json", "m.json") == 0
    assert opened(Path("out/a.png")).size == (3, 3)
    assert json.loads(Path("m.json").read_text())["images"][0]["status"] == "skipped"
    assert upscale("in", "out") == 0
    assert opened(Path("out/a.png")).size == (128, 96)


def test_the_manifest_tells_the_whole_run(here):
    save(Path("in/a.png"))
    assert upscale("in", "out", "--scale", 2, "--json", "deep/m.json") == 0
    read = json.loads(Path("deep/m.json").read_text())
    (entry,) = read["images"]
    assert entry["input"] == "in/a.png" and entry["output"] == "out/a.png" and entry["error"] is None
    assert entry["size_in"] == [32, 24] and entry["size_out"] == [64, 48] and entry["seconds"] > 0
    assert read["settings"]["scale"] == 2 and read["settings"]["generator"] == "my_upscaler:Bicubic"
    assert read["versions"]["torch"] == torch.__version__ and read["peak_memory_mb"]["main"] > 50


def test_an_interrupted_run_leaves_a_manifest_and_no_half_file(here):
    save(Path("in/a.png"))
    save(Path("in/b.png"))

    def interrupted(*words, **options):
        raise KeyboardInterrupt

    with mock.patch("refreward_trl.generators.tiling._whole", interrupted):
        assert upscale("in", "out", "--json", "m.json") == 130
    assert [entry["status"] for entry in json.loads(Path("m.json").read_text())["images"]] == ["pending", "pending"]
    assert not list(Path("out").iterdir())


def test_folders_below_are_taken_when_asked_but_never_the_outputs(here):
    save(Path("in/a.png"))
    save(Path("in/deep/b.png"))
    for _ in range(2):
        assert upscale("in", "in/out", "--recursive") == 0
    found = sorted(path.relative_to(here / "in").as_posix() for path in (here / "in").rglob("*.png"))
    assert found == ["a.png", "deep/b.png", "out/a.png", "out/deep/b.png"]
    assert [job.source.name for job in find_jobs(Path("in"), Path("o"))] == ["a.png"]


def test_two_inputs_with_one_output_are_refused_before_work(here):
    save(Path("in/a.png"))
    save(Path("in/a.jpg"))
    with pytest.raises(DataError, match=r"same output: in/a\.jpg and in/a\.png"):
        find_jobs(Path("in"), Path("out"), kind="webp")
    assert len(find_jobs(Path("in"), Path("out"))) == 2


def test_an_input_is_never_overwritten(here):
    save(Path("in/a.png"))
    Path("link").symlink_to("in")
    for source, target in (("in", "in"), ("in", "link"), ("in/a.png", "in/a.png"), ("in/a.png", "in")):
        with pytest.raises(DataError, match="would overwrite an input"):
            find_jobs(Path(source), Path(target))
    before = Path("in/a.png").read_bytes()
    assert upscale("in", "in") == 3
    assert Path("in/a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("source", "target", "kind", "message"),
    [
        ("a.png", "b.gif", None, "is not written"),
        ("a.png", "b.png", "jpg", "does not fit"),
        ("in", "b.png", None, "go into a folder"),
        ("in", "a.png", None, "go into a folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused(source, target, kind, message, here):
    save(Path("in/a.png"))
    save(Path("a.png"))
    with pytest.raises(ConfigError, match=message):
        find_jobs(Path(source), Path(target), kind=kind)


def test_names_of_outputs(here):
    for name in ("a.PNG", "b.jpeg", "c.bmp", "d.tiff"):
        save(Path("in") / name)
    named = [job.target.as_posix() for job in find_jobs(Path("in"), Path("out"))]
    assert named == ["out/a.PNG", "out/b.jpeg", "out/c.png", "out/d.tiff"]
    named = [job.target.as_posix() for job in find_jobs(Path("in"), Path("out"), kind="jpg")]
    assert named == ["out/a.jpg", "out/b.jpeg", "out/c.jpg", "out/d.jpg"]
    assert find_jobs(Path("in/a.PNG"), Path("x4.v2"))[0].target == Path("x4.v2/a.PNG")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["no", "out"], 3, "no: the image or folder does not exist"),
        (["empty", "out"], 3, "there is no image in this folder"),
        (["in", "out", "--scale", "0.5"], 2, "the scale is 0.5"),
        (["in", "out", "--scale", "nan"], 2, "the scale is nan"),
        (["in", "out", "--tile", "32"], 2, "32 is out of range; use at least 64"),
        (["in", "out", "--tile", "big"], 2, "'big' is no whole number"),
        (["in", "out", "--tile", "128", "--overlap", "128"], 2, "cannot share 128"),
        (["in", "out", "--quality", "101"], 2, "from 1 to 100"),
        (["in", "out", "--batch-size", "0"], 2, "at least 1"),
        (["in", "out", "--color-fix", "adian"], 2, "invalid choice: 'adian'"),
        (["in", "out", "--skip-exsting"], 2, "did you mean '--skip-existing'?"),
        (["in", "out", "--device", "cuda:99"], 6, "--device: the device 'cuda:99' cannot be used"),
        (["in", "out", "--prompt", "a cat"], 2, "takes no prompt"),
        (["in", "out", "--base-model", "sd21"], 2, "base_model is 'sd21'"),
    ],
)
def test_a_mistake_is_named(words, code, message, here, capsys):
    save(Path("in/a.png"))
    Path("empty").mkdir()
    assert upscale(*words) == code
    assert message in capsys.readouterr().err
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_mistakes_are_found_before_torch_is_imported(here):
    script = "import sys; from refreward_trl.cli.app import main; code = main(sys.argv[1:]); "
    script += "sys.exit(100 * ('torch' in sys.modules) + code)"
    save(Path("in/a.png"))
    for words in (["in", "in"], ["in", "out", "--scale", "0.1"], ["no", "out"]):
        done = subprocess.run([sys.executable, "-c", script, "upscale", *words], capture_output=True, env=os.environ)
        assert done.returncode in (2, 3), done.stderr


def test_a_full_disk_fails_by_name(here, capsys):
    save(Path("in/a.png"))
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        assert upscale("in", "out") == 3
    assert "the disk is full" in capsys.readouterr().err
    assert not list(Path("out").iterdir())

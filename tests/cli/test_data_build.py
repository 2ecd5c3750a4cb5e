from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from refreward_trl.cli import app
from refreward_trl.cli.recipe import read_recipe
from refreward_trl.data.images import read_image, to_float, to_uint8, write_png
from refreward_trl.data.preferences import PreferenceRecord, read_preferences
from refreward_trl.evaluation import metrics
from refreward_trl.generators.tiny import build_tiny_generator
from refreward_trl.resampling import downscale, upscale
from refreward_trl.rewards.fidelity import image_psnr

NETWORK = """
import torch


class Net(torch.nn.Module):
    def forward(self, lr_image):
        return torch.nn.functional.interpolate(lr_image, scale_factor=4, mode="bilinear").clamp(0, 1)


class Small(torch.nn.Module):
    def forward(self, lr_image):
        return torch.nn.functional.interpolate(lr_image, scale_factor=2)
"""


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`hr/`, `lr/`, `made/` (enlarged nearest), an untrained `generator/` and `build_net.py`; the current folder."""
    random = torch.Generator().manual_seed(0)
    for name in ("a", "b", "c"):
        coarse = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9, generator=random), size=64, mode="bicubic")
        hr_image = (coarse + 0.1 * torch.rand(1, 3, 64, 64, generator=random)).clamp(0, 1)
        lr_image = downscale(hr_image, 4).clamp(0, 1)
        nearest = lr_image.repeat_interleave(4, 2).repeat_interleave(4, 3)
        for folder, image in (("hr", hr_image), ("lr", lr_image), ("made", nearest)):
            write_png(tmp_path / folder / f"{name}.png", to_uint8(image[0]))
    build_tiny_generator(seed=1, vae_width=8, unet_channels=(8, 16)).save_pretrained(tmp_path / "generator")
    (tmp_path / "build_net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "build_net", raising=False)
    return tmp_path


def recipe(**values: Any) -> list[str]:
    given = {"output_dir": "out", "dataset": ".", "degradation": "bicubic", "crop_size": None, **values}
    Path("build.yaml").write_text(yaml.safe_dump({"method": "data build", **given}))
    return ["data", "build", "--config", "build.yaml"]


def built(**values: Any) -> list[PreferenceRecord]:
    assert app.main(recipe(**values)) == 0
    return read_preferences(values.get("output_dir", "out"))


ALL = ["bicubic", "tiny=generator", "net=build_net:Net", "nearest=made"]


def test_candidates_of_every_kind_of_method(photos: Path, capsys: Any) -> None:
    records = built(methods=ALL, label="none", artefacts=[], candidates_per_group=5)
    assert "wrote out: 3 groups of 3 photos" in capsys.readouterr().out
    assert [record.sample_id for record in records] == ["a", "b", "c"]
    for record in records:
        images = {made.generator: made.image.read() for made in record.candidates}
        assert set(images) == {"bicubic", "tiny", "net", "nearest", "hr"}
        assert (record.source, record.degradation, record.aspects) == ("unlabelled", "", ())
        lr_image = to_float(record.lr_image.read())
        assert torch.equal(images["bicubic"], to_uint8(upscale(lr_image[None], 4)[0]))
        assert torch.equal(images["nearest"], read_image(f"made/{record.sample_id}.png"))
        assert record.hr_image is not None and torch.equal(images["hr"], record.hr_image.read())
    assert app.main(["data", "validate", "out"]) == 0
    assert not [path for path in photos.iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize("form", ["imagefolder", "parquet"])
def test_the_same_recipe_gives_the_same_bytes(form: str, photos: Path) -> None:
    values = {"methods": ALL, "artefacts_per_group": 2, "candidates_per_group": 6, "format": form}
    built(**values)
    built(**values, output_dir="again")
    files = sorted(path.relative_to("out") for path in Path("out").rglob("*") if path.is_file())
    assert files and all(Path("out", file).read_bytes() == Path("again", file).read_bytes() for file in files)


def test_crops_keep_the_name_of_their_photo(photos: Path) -> None:
    records = built(dataset="hr", crop_size=32, crops_per_image=2, methods=["bicubic"])
    assert sorted(record.sample_id for record in records) == [f"{name}@{crop}" for name in "abc" for crop in (0, 1)]
    assert {record.photo for record in records} == {"a", "b", "c"}
    assert all(record.source == "constructed" and record.aspects == ("overall",) for record in records)
    assert all(record.degradation == "bicubic" for record in records)


def test_a_metric_labels_and_is_named(photos: Path, capsys: Any) -> None:
    records = built(methods=ALL, label="psnr_rgb", artefacts=[], include_hr=False)
    assert "label: psnr_rgb, a metric: nobody's opinion" in capsys.readouterr().out
    for record in records:
        assert record.source == "psnr_rgb" and not record.choices and record.hr_image is not None
        hr_image = to_float(record.hr_image.read())[None]
        values = [float(image_psnr(to_float(made.image.read())[None], hr_image)) for made in record.candidates]
        assert record.ranks["overall"] == tuple(1 + sum(other > value for other in values) for value in values)


def test_of_a_distance_the_lowest_is_best(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of LPIPS, which needs a package that is not here."""
    psnr = metrics.load_metric("psnr_rgb")
    distance = dataclasses.replace(psnr, name="distance", measure=lambda s: -psnr.measure(s), better="lower")
    by_psnr = built(methods=ALL, label="psnr_rgb", artefacts=[])
    monkeypatch.setattr(metrics, "load_metric", lambda word, device: distance)
    by_distance = built(methods=ALL, label="distance", artefacts=[], output_dir="again")
    assert [record.ranks for record in by_distance] == [record.ranks for record in by_psnr]


def test_contested_pairs_are_chosen_from_lr_images_alone(photos: Path) -> None:
    records = built(
        dataset="lr:lr", methods=ALL, label="none", artefacts=[], include_hr=False, choose="contested",
        candidates_per_group=2,
    )  # fmt: skip
    assert records and all(len(record.candidates) == 2 and record.hr_image is None for record in records)
    assert all(record.degradation == "" for record in records)


MISTAKES = [
    ({"methods": ["gone"]}, 2, "methods, gone: there is nothing at 'gone'"),
    ({"methods": ["a=bicubic", "a=default"]}, 2, "two models are called 'a'"),
    ({"methods": ["hr=bicubic"]}, 2, "hr is the name of the HR image"),
    ({"methods": ["made"], "crop_size": 32}, 2, "set crop_size: null"),
    ({"methods": ["made"], "dataset": "hr"}, 2, "made of other LR images"),
    ({"methods": ["build_net:Small", "bicubic"]}, 2, "the network returned"),
    ({"methods": ["spandrel:gone.pth", "bicubic"]}, 6, "spandrel cannot be imported"),
    ({"label": "psnr"}, 2, "psnr_y"),
    ({"label": "human"}, 2, "only people label as people do"),
    ({"label": "gradient_energy"}, 2, "says nothing about better and worse"),
    ({"dataset": "lr:lr"}, 2, "there are no HR images"),
    ({"dataset": "lr:lr", "include_hr": False, "artefacts_on": "method", "label": "psnr_y"}, 2, "compares with HR"),
    ({"min_difference": 255.0}, 3, "no group is left"),
    ({"output_dir": "hr"}, 2, "something is there already"),
    ({"dataset": "nowhere"}, 3, "the dataset does not exist"),
    ({"artefact": ["blur"]}, 2, "unknown key 'artefact'; did you mean 'artefacts'?"),
    ({"choose": "all"}, 2, "expected one of random, different, contested"),
    ({"candidates_per_group": 1}, 2, "expected a whole number >= 2"),
    ({"output_dir": None}, 2, "output_dir: expected text"),
]


@pytest.mark.parametrize(("values", "code", "message"), MISTAKES, ids=[str(values) for values, _, _ in MISTAKES])
def test_a_mistake_is_told_and_leaves_nothing_behind(
    values: dict[str, Any], code: int, message: str, photos: Path, capsys: Any
) -> None:
    before = set(photos.iterdir()) | {photos / "build.yaml"}
    assert app.main(recipe(**values)) == code
    assert message in capsys.readouterr().err
    assert set(photos.iterdir()) - {photos / "__pycache__"} <= before


def test_missing_and_wrong_images_of_a_folder_are_all_named(photos: Path, capsys: Any) -> None:
    (photos / "made/a.png").unlink()
    (photos / "made/b.png").unlink()
    assert app.main(recipe(methods=["made", "bicubic"])) == 3
    shown = capsys.readouterr().err
    assert "made/a: there is no SR image of this name" in shown and "made/b: " in shown
    for name in "ab":
        write_png(photos / f"made/{name}.png", torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert app.main(recipe(methods=["made", "bicubic"])) == 3
    assert capsys.readouterr().err.count("the SR image of made has 32x32 pixels, not 64x64") == 2


def test_a_dry_run_makes_nothing(photos: Path, capsys: Any) -> None:
    assert app.main([*recipe(methods=ALL), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "3 LR images of 3 photos, to out" in shown and "bicubic, tiny, net, nearest" in shown
    assert "the order that is known by construction" in shown and not Path("out").exists()
    assert app.main([*recipe(methods=["gone"]), "--dry-run"]) == 2


def test_the_packaged_recipe_builds_groups(photos: Path) -> None:
    recipe_values = read_recipe("tiny/preferences").values
    words = ["--dataset", "hr", "--dataset_split", "null", "--crop_size", "32", "--output_dir", "out"]
    assert app.main(["data", "build", "--config", "tiny/preferences", *words]) == 0
    records = read_preferences("out")
    assert len(records) == 3 * recipe_values["crops_per_image"]
    assert max(len(record.candidates) for record in records) == recipe_values["candidates_per_group"]
    assert app.main(["data", "split", "out", "--fractions", "train=0.5", "val=0.5"]) == 0
    assert app.main(["data", "validate", "out"]) == 0
    assert json.loads(Path("out/metadata.jsonl").read_text().splitlines()[0])["split"] in ("train", "val")

"""Every bad file of an evaluation is named in one pass, whatever is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refreward_trl.data.images import write_png
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.evaluation.metrics import load_metric
from refreward_trl.evaluation.model_inputs import ImageSet, Model, check_generators, read_inputs, read_models
from refreward_trl.generators import load_generator

NAMES = ("a", "b", "c", "d")
MODELS = [Model("bicubic", "bicubic")]


def image(side: int, name: str = "a") -> torch.Tensor:
    random = torch.Generator().manual_seed(ord(name[0]))
    return torch.randint(0, 256, (3, side, side), generator=random, dtype=torch.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """`hr/`, `lr/` and `sr/` with the images a to d, 4x, 32 pixels."""
    for name in NAMES:
        for folder, side in (("hr", 32), ("lr", 8), ("sr", 32)):
            write_png(tmp_path / folder / f"{name}.png", image(side, name))
    return tmp_path


def image_set(folder: Path, *, hr: bool = True) -> ImageSet:
    return ImageSet(folder / "lr", folder / "hr" if hr else None)


def saved(folder: Path) -> list[Model]:
    return [*MODELS, Model("net", str(folder / "sr"))]


def test_partners_are_matched_by_name_whatever_their_ending(folders: Path) -> None:
    (folders / "sr/b.png").rename(folders / "sr/b.PNG")
    (folders / "sr/notes.txt").write_text("not an image, and not called one")
    found = read_inputs(image_set(folders), saved(folders), [load_metric("psnr_y")])
    assert found.dataset.photos == list(NAMES)
    assert found.files["net"]["b"].name == "b.PNG"
    assert found.facts["scale"] == "4" and "LR images" not in found.facts


def test_all_bad_files_of_all_folders_are_named_in_one_error(folders: Path) -> None:
    (folders / "hr/a.png").unlink()
    (folders / "lr/b.png").write_text("<html>not an image</html>")
    write_png(folders / "hr/c.png", image(30))
    write_png(folders / "sr/a.png", image(28))
    (folders / "sr/c.png").write_bytes((folders / "sr/c.png").read_bytes()[:-30])
    (folders / "sr/d.png").unlink()
    write_png(folders / "sr/e.png", image(32))
    with pytest.raises(DataError) as caught:
        read_inputs(image_set(folders), saved(folders), [load_metric("psnr_y")])
    text = str(caught.value)
    for part in (
        f"{folders}/lr/a.png: no image of this name in {folders}/hr",
        f"{folders}/lr/b.png: the data is HTML",
        f"{folders}/hr/c.png: hr_image of 30x30 pixels is not 4 times lr_image of 8x8",
        f"{folders}/sr/a.png: the SR image of net has 28x28 pixels, not 32x32",
        f"{folders}/sr/c.png: the image is damaged",
        f"{folders}/sr/d: net has no SR image of this name",
        f"{folders}/sr/e.png: no LR image has the name",
    ):
        assert part in text, part
    assert "7 of " in text


def test_wrong_sizes_are_told_for_every_model(folders: Path) -> None:
    write_png(folders / "sr/a.png", image(28))
    write_png(folders / "other/x.png", image(32))
    for name in NAMES[1:]:
        write_png(folders / "other" / f"{name}.png", image(16))
    models = [*saved(folders), Model("other", str(folders / "other"))]
    with pytest.raises(DataError) as caught:
        read_inputs(image_set(folders, hr=False), models, [load_metric("lr_consistency")])
    text = str(caught.value)
    assert "the SR image of net has 28x28 pixels, not 32x32" in text
    assert text.count("the SR image of other has 16x16 pixels") == 3
    assert f"{folders}/other/a: other has no SR image" in text and f"{folders}/other/x.png: no LR image" in text


def test_many_bad_files_are_all_named(folders: Path) -> None:
    for number in range(40):
        write_png(folders / "sr" / f"extra{number}.png", image(32))
    with pytest.raises(DataError) as caught:
        read_inputs(image_set(folders), saved(folders), [])
    assert all(f"sr/extra{number}.png:" in str(caught.value) for number in range(40))


def test_images_below_the_window_of_a_metric_are_told_before_anything_is_measured(folders: Path) -> None:
    write_png(folders / "lr/b.png", image(3))
    write_png(folders / "hr/b.png", image(12))
    read_inputs(image_set(folders), MODELS, [load_metric("ssim_y")])
    with pytest.raises(DataError, match=r"lr/b.png: SR images of 12x12 pixels are too small for ssim_y:4"):
        read_inputs(image_set(folders), MODELS, [load_metric("ssim_y"), load_metric("ssim_y:4")])


def test_without_hr_images_only_metrics_that_need_none_are_taken(folders: Path) -> None:
    found = read_inputs(image_set(folders, hr=False), saved(folders), [load_metric("lr_consistency")])
    assert set(found.dataset[0]) == {"sample_id", "lr_image"}
    with pytest.raises(ConfigError, match="psnr_y, ssim_y compare with HR images"):
        read_inputs(
            image_set(folders, hr=False),
            MODELS,
            [load_metric(name) for name in ("psnr_y", "ssim_y", "lr_consistency")],
        )


def test_empty_and_missing_folders_are_told_together(folders: Path) -> None:
    (folders / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        read_inputs(ImageSet(folders / "nowhere", folders / "empty"), MODELS, [])
    assert f"{folders}/nowhere: the folder does not exist" in str(caught.value)
    assert f"{folders}/empty: the folder holds no images" in str(caught.value)


def test_a_dataset_makes_its_lr_images_and_says_how(folders: Path) -> None:
    found = read_inputs(ImageSet(dataset=f"hr:{folders / 'hr'}", degradation="bicubic", seed=3), MODELS, [])
    assert found.dataset[0]["lr_image"].shape == (3, 8, 8)
    assert found.facts["LR images"] == "made of the HR images by the preset bicubic, seed 3"


def test_models_are_read_from_words() -> None:
    words = ["default", "after=runs/a=b/generator", "runs/x=y/sr", "my_nets:make.net"]
    assert [(model.label, model.source) for model in read_models(words)] == [
        ("default", "default"),
        ("after", "runs/a=b/generator"),
        ("sr", "runs/x=y/sr"),
        ("make.net", "my_nets:make.net"),
    ]
    assert [model.label for model in read_models(["..", "a"])] == ["model", "a"]
    with pytest.raises(ConfigError, match="two models are called 'sr'"):
        read_models(["a/sr", "b/sr"])
    with pytest.raises(ConfigError, match="nothing to compare"):
        read_models(["default"])


def test_a_folder_of_images_is_told_from_a_generator(folders: Path, tmp_path: Path) -> None:
    assert Model("net", str(folders / "sr")).is_folder
    for name in ("generator_config.json", "weights/osediff.pkl"):
        sign = folders / "sr" / name
        sign.parent.mkdir(exist_ok=True)
        sign.write_text("{}")
        assert not Model("net", str(folders / "sr")).is_folder
        sign.unlink()
    assert not Model("default", "default").is_folder
    assert not Model("none", str(tmp_path / "none")).is_folder


def test_a_model_that_is_not_there_is_told_before_anything_is_measured(folders: Path) -> None:
    found = read_inputs(image_set(folders), MODELS, [])
    with pytest.raises(ConfigError, match="nothing at 'runs/non'") as caught:
        check_generators([*MODELS, Model("net", "runs/non")], found, load_generator)
    assert "net" in str(caught.value.where) and "folder of SR images" in str(caught.value.fix)

"""Constructed candidates: their order is a fact, their draws are stateless, and back-projection does what it says."""

import pytest
import torch

from refreward_trl.data import candidates
from refreward_trl.data.candidates import (
    ARTEFACTS,
    EVALUATION_COLUMNS,
    GROUP_PAIRS,
    HELDOUT_KINDS,
    JUDGE_KINDS,
    UNSEEN_KIND,
    apply_artefact,
    back_project,
    constructed_group,
    constructed_pairs,
    textured_crop,
)
from refreward_trl.data.preferences import CachedGroups, GroupDataset
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.randomness import stateless_generator
from refreward_trl.resampling import downscale, upscale


def smooth_photo(seed: int, height: int = 72, width: int = 96) -> torch.Tensor:
    """A colourful image with structure at several scales, uint8."""
    draws = torch.Generator().manual_seed(seed)
    layers = [
        torch.nn.functional.interpolate(
            torch.rand(1, 3, height // step, width // step, generator=draws), size=(height, width), mode="bicubic"
        )
        for step in (24, 8, 3)
    ]
    image = (0.5 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2])[0].clamp(0, 1)
    return (image * 255).round().byte()


@pytest.fixture(scope="module")
def photos() -> dict[str, torch.Tensor]:
    return {f"photo{i}": smooth_photo(i) for i in range(3)}


@pytest.fixture(scope="module")
def image(photos: dict[str, torch.Tensor]) -> torch.Tensor:
    return photos["photo0"][:, :64, :64].float() / 255


def test_the_held_out_kinds_are_disjoint_from_the_trained_and_the_unseen() -> None:
    assert not set(JUDGE_KINDS) & set(HELDOUT_KINDS)
    assert UNSEEN_KIND not in JUDGE_KINDS + HELDOUT_KINDS
    assert set(ARTEFACTS) == {*JUDGE_KINDS, *HELDOUT_KINDS, UNSEEN_KIND}


@pytest.mark.parametrize("kind", sorted(ARTEFACTS))
def test_more_severity_means_more_damage(kind: str, image: torch.Tensor) -> None:
    other = image.flip(2).rot90(1, (1, 2)).contiguous()
    errors = []
    for severity in (0.0, 0.5, 1.0):
        made = apply_artefact(kind, image, severity, generator=stateless_generator(0, kind), other=other)
        assert made.shape == image.shape
        assert made.min() >= 0 and made.max() <= 1
        errors.append(float((made - image).square().mean()))
    assert 0 < errors[0] < errors[2]
    if kind != "shift":  # a patch moved further is not always further off in squared error
        assert errors[0] < errors[1] < errors[2]


def test_an_artefact_is_a_pure_function_of_its_draws(image: torch.Tensor) -> None:
    torch.manual_seed(0)
    first = apply_artefact("noise", image, 0.5, generator=stateless_generator(1, "a"))
    torch.manual_seed(1)
    assert torch.equal(first, apply_artefact("noise", image, 0.5, generator=stateless_generator(1, "a")))
    assert not torch.equal(first, apply_artefact("noise", image, 0.5, generator=stateless_generator(1, "b")))


def test_back_projection_restores_the_low_resolution_content(image: torch.Tensor) -> None:
    spoiled = apply_artefact("colour", image, 1.0, generator=stateless_generator(0, "c"))
    before = (downscale(spoiled[None], 4) - downscale(image[None], 4)).abs().max()
    after = (downscale(back_project(spoiled, image)[None], 4) - downscale(image[None], 4)).abs().max()
    assert after < 0.1 * before


def test_a_group_is_a_pure_function_of_its_index(photos: dict[str, torch.Tensor]) -> None:
    group = constructed_group(photos, 5, seed=3, crop_size=64)
    again = constructed_group(dict(reversed(photos.items())), 5, seed=3, crop_size=64)
    assert torch.equal(group.candidates, again.candidates) and torch.equal(group.lr_image, again.lr_image)
    assert not torch.equal(group.candidates, constructed_group(photos, 8, seed=3, crop_size=64).candidates)
    assert group.candidates.shape == (12, 3, 64, 64) and group.lr_image.shape == (3, 16, 16)
    assert len(group.kinds) == 12 and group.better_worse == GROUP_PAIRS
    assert group.sample_id == f"{group.photo}@5" and group.source == "constructed"
    worse = {b for a, b in GROUP_PAIRS if a == 0}
    assert worse == set(range(1, 12))


@pytest.mark.parametrize("index", range(6))
def test_known_orders_agree_with_the_distance_to_the_hr_image(photos: dict[str, torch.Tensor], index: int) -> None:
    """Mild before severe and improved before restored are also nearer to the HR image, which nothing was fitted to."""
    group = constructed_group(photos, index, crop_size=64, kinds=("blur", "noise", "oversharpen"), projected_share=0.5)
    distance = (group.candidates.float() - group.candidates[:1].float()).square().mean((1, 2, 3))
    for better, worse in ((1, 2), (3, 4), (10, 11)):
        assert distance[better] < distance[worse]


def test_the_restore_function_makes_the_restored_candidate(photos: dict[str, torch.Tensor]) -> None:
    group = constructed_group(
        photos, 0, crop_size=64, projected_share=0.0, restore=lambda lr_image: 1 - upscale(lr_image, 4)
    )
    expected = 1 - upscale(group.lr_image[None].float() / 255, 4)[0]
    assert (group.candidates[11].float() / 255 - expected).abs().max() < 1 / 255


@pytest.mark.parametrize("column", EVALUATION_COLUMNS)
def test_every_column_gives_distinct_ordered_pairs(photos: dict[str, torch.Tensor], column: str) -> None:
    pairs = constructed_pairs(photos, column, 9, crop_size=64)
    assert len({pair.sample_id for pair in pairs}) == 9
    assert {pair.photo for pair in pairs} == set(photos)
    for pair in pairs:
        assert pair.column == column
        assert pair.better.dtype == pair.worse.dtype == pair.lr_image.dtype == torch.uint8
        assert not torch.equal(pair.better, pair.worse)
        assert (pair.kind == UNSEEN_KIND) == ("unseen" in column)


def test_projected_pairs_cannot_be_told_apart_by_lr_consistency_alone(photos: dict[str, torch.Tensor]) -> None:
    def gap(column: str) -> float:
        gaps = []
        for pair in constructed_pairs(photos, column, 9, crop_size=64, kinds=("blur", "colour", "noise")):
            better, worse = (downscale(x[None].float() / 255, 4) for x in (pair.better, pair.worse))
            gaps.append(float((better - worse).abs().mean()))
        return sum(gaps) / len(gaps)

    assert gap("projected_artefact") < 0.2 * gap("artefact")


def test_crops_prefer_texture() -> None:
    photo = torch.full((3, 64, 256), 128, dtype=torch.uint8)
    photo[:, :, 192:] = smooth_photo(1, 64, 64)
    found = [textured_crop(photo, 32, stateless_generator(0, "crop", i)).std() for i in range(10)]
    assert sum(float(std) > 0.02 for std in found) >= 8


def test_bad_requests_are_refused_by_name(photos: dict[str, torch.Tensor], image: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="'bluur'"):
        apply_artefact("bluur", image, 0.5, generator=stateless_generator(0, "x"))
    with pytest.raises(ConfigError, match="'nonsense'"):
        constructed_pairs(photos, "nonsense", 1)
    with pytest.raises(DataError, match="smaller than the crop"):
        textured_crop(photos["photo0"], 512, stateless_generator(0, "x"))
    with pytest.raises(DataError, match="at least two photos"):
        constructed_group({"one": photos["photo0"]}, 0, crop_size=64)


def test_datasets_give_the_rows_that_the_trainer_collates(photos: dict[str, torch.Tensor]) -> None:
    lazy = GroupDataset(lambda index: constructed_group(photos, index, crop_size=64), 3)
    cached = CachedGroups([constructed_group(photos, index, crop_size=64) for index in range(3)])
    assert len(lazy) == len(cached) == 3
    for index in range(3):
        assert torch.equal(lazy[index]["candidates"], cached[index]["candidates"])
        assert lazy[index]["better_worse"].tolist() == [list(pair) for pair in candidates.GROUP_PAIRS]
    with pytest.raises(IndexError):
        lazy[3]

import pytest
import torch

from refreward_trl.errors import DataError
from refreward_trl.evaluation.explanation import draw_explanation, explain, soft_regions
from refreward_trl.resampling import downscale


def pair(height: int = 32, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    sr_image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    return downscale(sr_image[None], 4)[0].clamp(0, 1), sr_image


def brightness(lr_image: torch.Tensor, sr_image: torch.Tensor) -> torch.Tensor:
    return sr_image.mean(dim=(1, 2, 3))


def difference(lr_image: torch.Tensor, sr_image: torch.Tensor) -> torch.Tensor:
    return -(downscale(sr_image, 4) - lr_image).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize(("height", "width", "shape"), [(32, 32, (8, 8)), (16, 64, (2, 8)), (64, 4, (8, 1))])
def test_windows_cover_every_pixel_once(height: int, width: int, shape: tuple[int, int]) -> None:
    windows = soft_regions(height, width, 8)
    assert windows.shape == (*shape, height, width)
    assert (windows >= 0).all()
    torch.testing.assert_close(windows.sum(dim=(0, 1)), torch.ones(height, width))


def test_the_parts_of_a_linear_score_sum_to_the_whole() -> None:
    explanation = explain(brightness, *pair())
    whole = explanation.score - explanation.enlarged_lr
    assert float(explanation.regions.sum()) == pytest.approx(whole, abs=1e-5)


def test_the_map_points_to_where_the_scorer_looks() -> None:
    def corner(lr_image: torch.Tensor, sr_image: torch.Tensor) -> torch.Tensor:
        return sr_image[..., -4:, :4].std(dim=(1, 2, 3))

    regions = explain(corner, *pair()).regions
    assert regions.argmax().item() == 7 * 8  # last row, first column
    assert regions[:6].abs().max() < 1e-6


def test_a_scorer_that_ignores_the_lr_image_loses_nothing_without_it() -> None:
    blind = explain(brightness, *pair())
    assert blind.without_lr == pytest.approx(blind.score)
    seeing = explain(difference, *pair())
    assert seeing.without_lr < seeing.score - 1e-3


def test_detail_that_lowers_the_score_is_blue_and_other_detail_orange() -> None:
    lr_image, sr_image = pair()

    def left_good_right_bad(lr_images: torch.Tensor, sr_images: torch.Tensor) -> torch.Tensor:
        return sr_images[..., :16].std(dim=(1, 2, 3)) - sr_images[..., 16:].std(dim=(1, 2, 3))

    picture = draw_explanation(explain(left_good_right_bad, lr_image, sr_image), lr_image, sr_image)
    width = (picture.shape[-1] - 4 * 12) // 3
    panel = picture[:, 30 : 30 + width, -width - 12 : -12].float()
    red, blue = panel[0] - panel[2], panel[2] - panel[0]
    assert red[:, : width // 2 - 40].mean() > 20
    assert blue[:, width // 2 + 40 :].mean() > 20


def test_images_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(DataError, match="made from"):
        explain(brightness, torch.rand(3, 8, 8), torch.rand(3, 30, 32))

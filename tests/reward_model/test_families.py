"""Every family of networks: what is fed equals what the stock processors feed, and gradients reach the pixels."""

import pytest
import torch
from PIL import Image
from tiny_judges import FAMILY_NAMES, family_judge, judge_inputs
from torch.nn import functional as F
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from refreward_trl.data.images import from_pil, to_float
from refreward_trl.errors import CheckpointError, DataError
from refreward_trl.resampling import upscale
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec

pytestmark = pytest.mark.parametrize("family", FAMILY_NAMES)


def images(rows: int = 3, *, seed: int = 0, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lr_image = torch.rand(rows, 3, size // 4, size // 4, generator=generator)
    return lr_image, torch.rand(rows, 3, size, size, generator=generator)


def as_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def test_ratings_depend_on_both_images(family: str) -> None:
    judge = family_judge(family)
    lr_image, sr_image = images()
    ratings = judge.rate(lr_image, sr_image)
    assert ((ratings > 1) & (ratings < 5)).all()
    assert (ratings - judge.rate(lr_image.flip(0), sr_image)).abs().max() > 1e-3
    assert (ratings - judge.rate(lr_image, sr_image.flip(0))).abs().max() > 1e-3


def test_gradient_matches_the_finite_difference(family: str) -> None:
    # float64, along the gradient: the stock classes cast to fp32 inside, so other directions drown in rounding.
    judge = family_judge(family, sharpness=3.0)  # less curved than at 6
    judge.model.double()
    lr_image, sr_image = (image.double() for image in images(1))
    sr_image.requires_grad_()
    (gradient,) = torch.autograd.grad(judge.rate(lr_image, sr_image).sum(), sr_image)
    step = 1e-2 * gradient / gradient.norm()
    up, down = (judge.rate(lr_image, sr_image.detach() + move) for move in (step, -step))
    slope = float((up - down).sum()) / 2e-2
    assert slope == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_pixels_and_tokens_equal_those_of_the_stock_processor(family: str) -> None:
    judge = family_judge(family)
    lr_image, sr_image = images(1)
    pair = [as_pil(upscale(lr_image, 4)[0].clamp(0, 1)), as_pil(sr_image[0])]
    batches = [to_float(from_pil(image, where="test"))[None] for image in pair]
    ours = judge_inputs(judge, *batches)
    if family.startswith("qwen"):
        stock = Qwen2VLImageProcessorPil(
            patch_size=8, merge_size=2, do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )(pair, return_tensors="pt")
        assert ours["image_grid_thw"].tolist() == stock["image_grid_thw"].tolist()
        tokens = int((stock["image_grid_thw"].prod(1) // 4).sum())
    else:
        stock = Idefics3ImageProcessorPil(
            do_resize=False, do_image_splitting=False, max_image_size={"longest_edge": 32}
        )([pair], return_tensors="pt")
        tokens = 2 * 4
    torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"], rtol=0, atol=1e-6)
    assert int((ours["input_ids"] == judge.family.placeholder_id).sum()) == tokens


def test_a_group_shares_its_lr_image_without_changing_a_score(family: str) -> None:
    judge = family_judge(family)
    lr_image, sr_image = images(5)
    lr_image = lr_image[:1].expand(5, -1, -1, -1)
    one_by_one = torch.cat([judge.rate(lr_image[:1], image[None]) for image in sr_image])
    torch.testing.assert_close(judge.rate_group(lr_image[0], sr_image), one_by_one, rtol=0, atol=1e-5)
    torch.testing.assert_close(judge.rate(lr_image, sr_image), one_by_one, rtol=0, atol=1e-5)


def test_a_group_of_large_images_is_rated_by_tiles(family: str) -> None:
    judge = family_judge(family)
    lr_image, sr_image = images(2, size=96)
    lr_image = lr_image[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        judge.rate_group(lr_image[0], sr_image), judge.rate(lr_image, sr_image), rtol=0, atol=1e-5
    )


def test_gradients_of_a_group_are_those_of_its_images(family: str) -> None:
    judge = family_judge(family)
    lr_image, sr_image = images(3)
    lr_image = lr_image[:1].expand(3, -1, -1, -1)
    grads = []
    for score in (judge.rate, lambda lr, sr: judge.rate_group(lr[0], sr)):
        pixels = sr_image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(lr_image, pixels).sum(), pixels)
        grads.append(gradient)
    assert F.cosine_similarity(*(gradient.flatten() for gradient in grads), dim=0) > 1 - 1e-6
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_neighbours_with_one_lr_image_share_it(family: str) -> None:
    judge = family_judge(family)
    lr_image, sr_image = images(5)
    lr_image = lr_image[[0, 0, 1, 2, 2]]
    torch.testing.assert_close(
        judge.rate_neighbours(lr_image, sr_image), judge.rate(lr_image, sr_image), rtol=0, atol=1e-5
    )


def test_a_plain_grey_image_is_an_image(family: str) -> None:
    judge = family_judge(family)
    grey = torch.full((1, 3, 32, 32), 0.5)
    assert judge.rate(torch.rand(1, 3, 8, 8), grey).isfinite().all()


def test_a_token_budget_changes_no_score(family: str) -> None:
    judge = family_judge(family)
    frugal = family_judge(family, options={"batch_tokens": 1})
    lr_image, sr_image = images()
    torch.testing.assert_close(frugal.rate(lr_image, sr_image), judge.rate(lr_image, sr_image), rtol=0, atol=1e-5)


def test_aspects_are_asked_one_by_one_and_weighted(family: str) -> None:
    prompt = "How much {aspect}? {braces} mean nothing."
    judge = family_judge(family, prompt=prompt, aspects={"consistency": 3.0, "naturalness": 1.0, "unused": 0.0})
    assert list(judge.prompts) == ["consistency", "naturalness"]
    lr_image, sr_image = images()
    parts = {aspect: judge.expected_rating(lr_image, sr_image, aspect=aspect) for aspect in judge.prompts}
    assert (parts["consistency"] - parts["naturalness"]).abs().max() > 1e-4
    expected = 0.75 * parts["consistency"] + 0.25 * parts["naturalness"]
    torch.testing.assert_close(judge.rate(lr_image, sr_image), expected, rtol=0, atol=1e-5)


def test_an_lr_image_that_is_larger_than_its_sr_image_is_refused(family: str) -> None:
    with pytest.raises(DataError, match="not an integer multiple of LR size 32x32"):
        family_judge(family).rate(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 8, 8))


def test_a_native_lr_image_takes_fewer_tokens_or_is_refused(family: str) -> None:
    if not family.startswith("qwen"):
        with pytest.raises(CheckpointError, match="one size only"):
            family_judge(family, lr_view="native")
        return
    native = family_judge(family, lr_view="native", tile=64)
    lr_image, sr_image = images(2, size=64)
    tokens = [
        judge_inputs(judge, lr_image, sr_image)["input_ids"].shape[1] for judge in (native, family_judge(family))
    ]
    assert tokens[1] - tokens[0] == 16 - 1  # 64 px and 16 px on a grid of 16 px
    group = native.rate_group(lr_image[0], sr_image)
    torch.testing.assert_close(group, native.rate(lr_image[:1].expand(2, -1, -1, -1), sr_image), rtol=0, atol=1e-5)


def test_clips_need_a_family_that_reads_them(family: str) -> None:
    if family == "qwen2_5_vl":
        assert isinstance(family_judge(family, layout="clip"), RateJudge)
        return
    with pytest.raises(CheckpointError, match="frames of one clip"):
        family_judge(family, layout="clip")


def test_a_spec_of_another_patch_grid_is_refused(family: str) -> None:
    with pytest.raises(CheckpointError, match="the spec says patch 16"):
        family_judge(family, patch=16, tile=64)


def test_the_spec_survives_its_json(family: str) -> None:
    spec = family_judge(family).spec
    assert JudgeSpec.from_json(spec.to_json()) == spec

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import SMALL, judge_inputs
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from refreward_trl.errors import CheckpointError, DataError
from refreward_trl.resampling import upscale
from refreward_trl.reward_model.preprocess import patchify, tile_starts
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.tiny import build_tiny_judge

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def asked(spec: JudgeSpec) -> RateJudge:
    return build_tiny_judge(**SMALL, patch=spec.patch, spec=spec)


def random_image(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_batch(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("normalised", [False, True])
def test_patches_equal_those_of_the_stock_processor(normalised: bool) -> None:
    # LR and SR of one size, so that no upsampling comes between the two ways.
    spec = JudgeSpec(layout="images", image_mean=MEAN if normalised else None, image_std=STD if normalised else None)
    pair = [random_image(32, 48), random_image(32, 48).transpose(Image.Transpose.ROTATE_180)]
    stock = Qwen2VLImageProcessorPil(
        patch_size=spec.patch,
        merge_size=spec.merge,
        do_resize=False,
        do_normalize=normalised,
        image_mean=list(MEAN),
        image_std=list(STD),
    )(pair, return_tensors="pt")
    ours = judge_inputs(asked(spec), as_batch(pair[0]), as_batch(pair[1]))
    torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"], rtol=0, atol=1e-6)
    assert ours["image_grid_thw"].tolist() == stock["image_grid_thw"].tolist()


def test_clip_holds_the_upsampled_lr_image_first() -> None:
    spec = JudgeSpec(patch=8, merge=2)
    lr_image, sr_image = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 16, 16)
    inputs = judge_inputs(asked(spec), lr_image, sr_image)
    rows = inputs["pixel_values_videos"].view(2, 4, 3, 2, 8, 8)  # image, patch, channel, frame, y, x
    torch.testing.assert_close(rows[1, 0, :, 0], upscale(lr_image, 4)[1, :, :8, :8])
    torch.testing.assert_close(rows[1, 1, :, 1], sr_image[1, :, :8, 8:])
    torch.testing.assert_close(rows[1, 2, :, 1], sr_image[1, :, 8:, :8])


@pytest.mark.parametrize(("layout", "visuals"), [("clip", 1), ("images", 2)])
def test_placeholders_match_the_grid(layout: str, visuals: int) -> None:
    spec = JudgeSpec(layout=layout)
    judge = asked(spec)
    inputs = judge_inputs(judge, torch.rand(3, 3, 8, 12), torch.rand(3, 3, 32, 48))
    count = (inputs["input_ids"] == judge.family.placeholder_id).sum(1)
    assert count.tolist() == [visuals * (32 // 16) * (48 // 16)] * 3
    assert (inputs["mm_token_type_ids"] > 0).sum(1).tolist() == count.tolist()


def test_gradient_reaches_every_pixel_of_both_images() -> None:
    spec = JudgeSpec()
    lr_image = torch.rand(1, 3, 8, 8, requires_grad=True)
    sr_image = torch.rand(1, 3, 32, 32, requires_grad=True)
    inputs = judge_inputs(asked(spec), lr_image, sr_image)
    inputs["pixel_values_videos"].sum().backward()
    assert sr_image.grad is not None
    assert torch.equal(sr_image.grad, torch.ones_like(sr_image))
    assert lr_image.grad is not None
    assert (lr_image.grad != 0).all()


@pytest.mark.parametrize(
    ("lr_size", "sr_size", "says"),
    [
        ((8, 8), (32, 33), "32x33 is not an integer multiple of LR size 8x8"),
        ((8, 8), (32, 16), "32x16"),
        ((6, 8), (24, 32), "24x32 is not a multiple of patch 8 x merge 2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(lr_size: tuple, sr_size: tuple, says: str) -> None:
    spec = JudgeSpec()
    judge = asked(spec)
    with pytest.raises(DataError, match=says):
        judge_inputs(judge, torch.rand(1, 3, *lr_size), torch.rand(1, 3, *sr_size))


def test_batches_of_different_lengths_are_refused() -> None:
    spec = JudgeSpec()
    judge = asked(spec)
    with pytest.raises(DataError, match=r"\(2, 3, 8, 8\)"):
        judge_inputs(judge, torch.rand(2, 3, 8, 8), torch.rand(3, 3, 32, 32))


def test_patchify_keeps_every_value_once() -> None:
    frames = torch.arange(2 * 2 * 3 * 32 * 16, dtype=torch.float32).view(2, 2, 3, 32, 16)
    rows = patchify(frames, patch=8, merge=2)
    assert rows.shape == (2 * 4 * 2, 3 * 2 * 64)
    assert torch.equal(rows.flatten().sort().values, frames.flatten())


def test_unknown_rating_token_is_named() -> None:
    spec = JudgeSpec(rating_tokens=("1", "excellent"), rating_values=(1.0, 2.0))
    with pytest.raises(CheckpointError, match="'excellent'"):
        asked(spec)


def test_a_template_without_placeholders_is_refused() -> None:
    judge = asked(JudgeSpec())
    judge.tokenizer.chat_template = "{% for message in messages %}user{% endfor %}"
    with pytest.raises(CheckpointError, match="0 <\\|video_pad\\|> tokens"):
        RateJudge(judge.model, judge.tokenizer, judge.spec)


@pytest.mark.parametrize(("size", "tile"), [(128, 128), (129, 128), (300, 128), (512, 128)])
def test_tiles_cover_the_side_and_stay_inside(size: int, tile: int) -> None:
    starts = tile_starts(size, tile)
    covered = {pixel for start in starts for pixel in range(start, start + tile)}
    assert covered == set(range(size))

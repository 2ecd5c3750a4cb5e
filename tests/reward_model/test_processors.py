"""The processors that other libraries want show a network exactly what the differentiable path shows it."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import FAMILY_NAMES, family_judge, judge_inputs

from refreward_trl.data.images import from_pil, to_float
from refreward_trl.errors import CheckpointError
from refreward_trl.reward_model.processors import build_processor


def pictures(count: int, *, seed: int = 0) -> list[Image.Image]:
    draws = np.random.default_rng(seed)
    return [Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("statistics", [(0.5, 0.5, 0.5), (0.4, 0.5, 0.6)])
def test_tokens_and_pixels_are_those_of_the_differentiable_path(
    family: str, statistics: tuple[float, float, float]
) -> None:
    judge = family_judge(family, image_mean=statistics, image_std=(0.2, 0.3, 0.4))
    processor = build_processor(judge.model.config, judge.tokenizer, judge.spec)
    pair = pictures(2)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": judge.spec.prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    stock = processor(text=[text], images=[pair], return_tensors="pt")
    ours = judge_inputs(judge, *(to_float(from_pil(picture, where="test"))[None] for picture in pair))
    assert stock["input_ids"].tolist() == ours["input_ids"].tolist()
    torch.testing.assert_close(stock["pixel_values"].flatten(), ours["pixel_values"].flatten(), rtol=0, atol=1e-6)
    if family.startswith("qwen"):
        assert stock["image_grid_thw"].tolist() == ours["image_grid_thw"].tolist()


def test_two_rows_of_three_images(tmp_path: object) -> None:
    judge = family_judge("idefics3")
    processor = build_processor(judge.model.config, judge.tokenizer, judge.spec)
    batch = processor(
        text=["<image><image><image>a"] * 2, images=[pictures(3), pictures(3, seed=1)], return_tensors="pt"
    )
    assert batch["pixel_values"].shape == (2, 3, 3, 32, 32)


def test_a_judge_of_clips_has_none() -> None:
    judge = family_judge("qwen2_5_vl", layout="clip")
    with pytest.raises(CheckpointError, match="layout 'clip'"):
        build_processor(judge.model.config, judge.tokenizer, judge.spec)

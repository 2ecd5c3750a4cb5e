"""The processors that other libraries want show a network exactly what the differentiable path shows it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_judges import FAMILY_NAMES, family_judge, judge_inputs

from refreward_trl.data.images import from_pil, to_float
from refreward_trl.errors import CheckpointError
from refreward_trl.reward_model.processors import build_processor, load_processor
from refreward_trl.reward_model.scoring import RateJudge


def pictures(count: int, *, seed: int = 0) -> list[Image.Image]:
    draws = np.random.default_rng(seed)
    return [Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


def both_paths(processor: Any, judge: RateJudge, pair: list[Image.Image]) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a processor makes of the question about a pair of images, and what the differentiable path makes of it."""
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": judge.spec.prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    stock = processor(text=[text], images=[pair], return_tensors="pt")
    return stock, judge_inputs(judge, *(to_float(from_pil(picture, where="test"))[None] for picture in pair))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("statistics", [(0.5, 0.5, 0.5), (0.4, 0.5, 0.6)])
def test_tokens_and_pixels_are_those_of_the_differentiable_path(
    family: str, statistics: tuple[float, float, float]
) -> None:
    judge = family_judge(family, image_mean=statistics, image_std=(0.2, 0.3, 0.4))
    processor = build_processor(judge.model.config, judge.tokenizer, judge.spec)
    pair = pictures(2)
    stock, ours = both_paths(processor, judge, pair)
    assert stock["input_ids"].tolist() == ours["input_ids"].tolist()
    torch.testing.assert_close(stock["pixel_values"].flatten(), ours["pixel_values"].flatten(), rtol=0, atol=1e-6)
    if family.startswith("qwen"):
        assert stock["image_grid_thw"].tolist() == ours["image_grid_thw"].tolist()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_stock_processors_with_torchvision_show_the_same(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    judge = family_judge(family, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    judge.save_pretrained(tmp_path)
    stock_processor(family, judge).save_pretrained(tmp_path)
    processor = load_processor(tmp_path, judge.model.config, judge.tokenizer, judge.spec)
    assert "Pil" not in type(processor.image_processor).__name__
    stock, ours = both_paths(processor, judge, pictures(2))
    assert stock["input_ids"].tolist() == ours["input_ids"].tolist()
    torch.testing.assert_close(stock["pixel_values"].flatten(), ours["pixel_values"].flatten(), rtol=0, atol=1e-6)


def stock_processor(family: str, judge: RateJudge) -> Any:
    """What the authors of a network of this size would save beside it."""
    statistics = {"image_mean": judge.spec.image_mean, "image_std": judge.spec.image_std}
    template = judge.tokenizer.chat_template
    if family == "idefics3" or family == "smolvlm":
        images = transformers.Idefics3ImageProcessor(
            do_image_splitting=False, max_image_size={"longest_edge": 32}, do_pad=False, **statistics
        )
        return transformers.Idefics3Processor(images, judge.tokenizer, image_seq_len=4, chat_template=template)
    grid = {"patch_size": judge.spec.patch, "merge_size": judge.spec.merge}
    images = transformers.Qwen2VLImageProcessor(**grid, **statistics)
    if family == "qwen2_5_vl":
        videos: Any = transformers.Qwen2VLVideoProcessor(**grid)
        return transformers.Qwen2_5_VLProcessor(images, judge.tokenizer, videos, chat_template=template)
    videos = transformers.Qwen3VLVideoProcessor(**grid)
    return transformers.Qwen3VLProcessor(images, judge.tokenizer, videos, chat_template=template)


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

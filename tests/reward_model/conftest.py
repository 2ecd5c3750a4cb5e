"""A judge small enough that every test can afford one."""

import pytest
import torch
from tiny_judges import SMALL, sharpen

from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.tiny import build_tiny_judge


@pytest.fixture
def judge() -> RateJudge:
    """A small "clip" judge with 32 px tiles."""
    return sharpen(build_tiny_judge(**SMALL, spec=JudgeSpec(tile=32)))


@pytest.fixture
def image_judge() -> RateJudge:
    """The same network asked with two images."""
    return sharpen(build_tiny_judge(**SMALL, spec=JudgeSpec(tile=32, layout="images")))


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Five LR images of 8 px and SR images of 32 px."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(5, 3, 8, 8, generator=generator), torch.rand(5, 3, 32, 32, generator=generator)

"""Toy parts: a generator whose output is mid-grey, a dataset in memory, and a reward that anybody can check by eye."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor

from refreward_trl.generators.epsilon import EpsLatentGenerator
from refreward_trl.generators.tiny import build_tiny_generator

SIDE = 8


class ToyPairs:
    """LR images of 8 px and HR images of 32 px, a pure function of the index; counts what is read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        source = torch.Generator().manual_seed(index)
        hr_image = F.interpolate(torch.rand(1, 3, 8, 8, generator=source), size=4 * SIDE, mode="bilinear")[0]
        lr_image = F.interpolate(hr_image[None], size=SIDE, mode="area")[0]
        return {
            "sample_id": f"photo{index}",
            "lr_image": (lr_image * 255).byte(),
            "hr_image": (hr_image * 255).byte(),
        }


def brightness(*, completions: Tensor, **columns: Any) -> Tensor:
    """Ten times the mean pixel, with a graph."""
    return 10 * completions.mean(dim=(1, 2, 3))


@pytest.fixture
def reward() -> Callable[..., Tensor]:
    return brightness


@pytest.fixture
def black_box() -> Callable[..., list[float]]:
    """The same as plain floats."""

    def black_box_brightness(*, completions: Tensor, **columns: Any) -> list[float]:
        return brightness(completions=completions.detach()).tolist()

    return black_box_brightness


@pytest.fixture
def pairs() -> Callable[[int], ToyPairs]:
    return ToyPairs


def grey_generator() -> EpsLatentGenerator:
    """An untrained decoder saturates; in the middle of the range every pixel can become brighter or darker."""
    generator = build_tiny_generator(vae_width=8, unet_channels=(8, 16))
    output = generator.vae.decoder.layers[-1]
    with torch.no_grad():
        output.weight.mul_(0.3)
        output.bias.fill_(0.5)
    return generator


def toy_lora(**settings: Any) -> LoraConfig:
    targets = ["conv1", "conv2", "conv_in", "conv_out", "to_q", "to_v"]
    return LoraConfig(**{"r": 2, "lora_alpha": 2, "target_modules": targets, **settings})


@pytest.fixture
def make_generator() -> Callable[[], EpsLatentGenerator]:
    return grey_generator


@pytest.fixture
def lora() -> Callable[..., LoraConfig]:
    return toy_lora


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Keywords of a quiet two-sample run on the CPU."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            **changes,
        }

    return make


@pytest.fixture
def read_metrics() -> Callable[[str | Path], list[dict[str, Any]]]:
    def read(folder: str | Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]

    return read

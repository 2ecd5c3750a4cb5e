"""Generators so small that a test takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from refreward_trl.generators.epsilon import EpsLatentConfig, EpsLatentGenerator
from refreward_trl.generators.tiny import build_tiny_generator

MakeGenerator = Callable[..., EpsLatentGenerator]


@pytest.fixture
def make_generator() -> MakeGenerator:
    def make(**config: object) -> EpsLatentGenerator:
        return build_tiny_generator(vae_width=8, unet_channels=(8, 16), latent_scale=1.3, latent_shift=0.1, **config)

    return make


@pytest.fixture
def generator(make_generator: MakeGenerator) -> EpsLatentGenerator:
    return make_generator()


@pytest.fixture
def kl_generator() -> EpsLatentGenerator:
    """The other stock VAE, three U-Net levels with cross-attention, two prompt tokens, OSEDiff's numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
        unet = UNet2DConditionModel(
            block_out_channels=(8, 8, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        config = EpsLatentConfig(latent_scale=0.18215, t_net=999, t_coeff=999, input_scaling="none", color_fix="adain")
        return EpsLatentGenerator(unet, vae, config, torch.randn(1, 2, 16))


@pytest.fixture
def lr_image() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def lora_config() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v", "conv1", "conv_in", "conv_out"])


@pytest.fixture
def train_policy() -> Callable[[list[nn.Parameter]], None]:
    """Moves every trainable parameter, as some training would."""

    def train(parameters: list[nn.Parameter]) -> None:
        source = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in parameters:
                parameter += 0.2 * torch.randn(parameter.shape, generator=source)

    return train

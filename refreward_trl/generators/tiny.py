"""A small untrained generator of stock classes: the starting point of the shipped default, and of every test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn

from refreward_trl.generators.epsilon import EpsLatentConfig, EpsLatentGenerator

LATENT_CHANNELS = 8
PROMPT_DIM = 32


def build_tiny_generator(
    *,
    seed: int = 0,
    vae_width: int = 32,
    unet_channels: Sequence[int] = (32, 64, 96),
    layers_per_block: int = 1,
    **config: Any,
) -> EpsLatentGenerator:
    """Builds an untrained one-step generator; with the default sizes about 2 million parameters.

    Latents are half the image's size with 8 channels: at a quarter the VAE's own reconstruction falls below bicubic
    enlargement, and nothing the denoiser does can repair that.

    Args:
        seed: Of the weights; the global random state is left as it was.
        vae_width: Channels of the VAE.
        unet_channels: Channels of the U-Net's levels, multiples of 8.
        layers_per_block: Residual blocks per level.
        **config: Fields of `EpsLatentConfig`; latent_scale is 1 until `calibrate_latents` measures it on a trained
            VAE.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(vae_width, vae_width),
            decoder_block_out_channels=(vae_width, vae_width),
            num_encoder_blocks=(1, 2),
            num_decoder_blocks=(2, 1),
            latent_channels=LATENT_CHANNELS,
        )
        _initialise_vae(vae)
        unet = UNet2DConditionModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=tuple(unet_channels),
            down_block_types=("DownBlock2D",) * len(unet_channels),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=("UpBlock2D",) * len(unet_channels),
            layers_per_block=layers_per_block,
            cross_attention_dim=PROMPT_DIM,
            norm_num_groups=8,
        )
        # Small, so that the first output is nearly the enlarged LR; not zero, since a zero layer lets no gradient into
        # the network.
        nn.init.normal_(unet.conv_out.weight, std=1e-2)
        nn.init.zeros_(cast(Tensor, unet.conv_out.bias))
    return EpsLatentGenerator(unet, vae, EpsLatentConfig(**{"latent_scale": 1.0, **config}))


def _initialise_vae(vae: AutoencoderTiny) -> None:
    """Gives every layer unit gain and every residual branch a zero start.

    The default initialisation shrinks the signal in each of the dozen layers, and a VAE that outputs a constant learns
    slowly.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in vae.named_modules():
        if name.endswith(".conv.4") and isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)

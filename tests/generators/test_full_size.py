"""The families at their real size, built from their configurations without weights: counts and shapes of the released
checkpoints."""

from __future__ import annotations

import published_models as fixtures
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from refreward_trl.errors import CheckpointError
from refreward_trl.generators.low_rank import LowRank, adapter_state, merge, split_adapters

SD21_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD3_TRANSFORMER = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SD21_UNET)


def updates(network: nn.Module, layers: list[str], rank: int) -> dict[str, LowRank]:
    found = {}
    for name in layers:
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        kernel = weight.shape[2:]
        found[name] = LowRank(
            torch.empty(rank, weight.shape[1], *kernel, device="meta"),
            torch.empty(len(weight), rank, *([1] * len(kernel)), device="meta"),
            8 / rank,
        )
    return found


def count(state: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


def test_osediff_has_the_released_counts(unet: UNet2DConditionModel) -> None:
    lists = {part: fixtures.layers_of(unet, fixtures.UNET_LAYERS, part) for part in fixtures.PARTS}
    assert {part: len(names) for part, names in lists.items()} == {"encoder": 94, "decoder": 148, "others": 16}
    state: dict[str, Tensor] = {}
    for part, names in lists.items():
        merge(unet, (found := updates(unet, names, 4)), where="x", base="y")
        state |= adapter_state(found, f"default_{part}")
    assert len(state) == 516
    assert round(count(state) / 1e6, 3) == 4.056
    again, rest = split_adapters(state, alpha=8, where="x")
    assert not rest and {len(layers) for layers in again.values()} == {94, 148, 16}


def test_the_vae_of_osediff_has_the_released_counts() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(**SD_VAE)
    names = fixtures.layers_of(vae, fixtures.VAE_LAYERS, "encoder")
    assert len(names) == 32
    found = updates(vae, names, 4)
    merge(vae, found, where="x", base="y")
    assert round(count(adapter_state(found)) / 1e6, 3) == 0.369


def test_hypir_has_the_released_counts(unet: UNet2DConditionModel) -> None:
    names = [
        name
        for part in fixtures.PARTS
        for name in fixtures.layers_of(unet, fixtures.UNET_LAYERS, part)
        if name != "conv_in"
    ]
    state = adapter_state(updates(unet, names, 256), "default")
    assert len(state) == 514
    assert round(count(state) / 1e6, 1) == 259.5


def test_tsd_sr_has_the_released_counts() -> None:
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**SD3_TRANSFORMER)
    names = fixtures.layers_of(transformer, fixtures.SD3_LAYERS, "others")
    found = updates(transformer, names, 64)
    merge(transformer, found, where="x", base="y")
    state = adapter_state(found)
    assert len(state) == 532
    assert round(count(state) / 1e6, 1) == 89.3


def test_another_width_is_refused_at_full_size(unet: UNet2DConditionModel) -> None:
    with torch.device("meta"):
        smaller = UNet2DConditionModel(**{**SD21_UNET, "cross_attention_dim": 768})
    names = [name for name in fixtures.layers_of(unet, ["to_k"], "encoder") if "attn2" in name]
    with pytest.raises(CheckpointError, match=r"another base model.*768.*1024"):
        merge(smaller, updates(unet, names, 4), where="osediff.pkl", base="a base")

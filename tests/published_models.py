"""Base models and published checkpoints in miniature, written by stock diffusers and peft in the authors' layouts.

Nothing here comes from the package: what it reads must agree with what these libraries compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

TEXT_DIM = 16
TOKENS = 7
UNET_LAYERS = (
    *("to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_in", "conv_shortcut", "conv_out"),
    *("proj_out", "proj_in", "ff.net.2", "ff.net.0.proj"),
)
"""Ends of the names of the layers that OSEDiff and PiSA-SR adapt."""
VAE_LAYERS = (
    *("conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out", "to_k", "to_q", "to_v", "to_out.0"),
    "quant_conv",
)
SD3_LAYERS = (
    *("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj"),
    *("proj", "linear", "proj_out"),
)
PARTS = ("encoder", "decoder", "others")


@dataclass
class Published:
    """A checkpoint beside the networks that its authors' code would run.

    Attributes:
        path: The file or folder.
        base: The folder of the base model.
        denoiser: The stock network with all adapters active.
        vae: The stock VAE with its adapters active.
    """

    path: Path
    base: Path
    denoiser: Any
    vae: Any


def write_sd21_base(folder: Path, *, prediction: str = "epsilon", width: int = TEXT_DIM) -> Path:
    """Writes a model with the layout of Stable Diffusion 2.1, of some ten thousand parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=width,
            attention_head_dim=2,
            norm_num_groups=4,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=40,
                hidden_size=width,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
        )
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text.save_pretrained(folder / "text_encoder")
    _tokenizer().save_pretrained(folder / "tokenizer")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    ).save_pretrained(folder / "scheduler")
    return folder


def write_sd3_base(folder: Path) -> Path:
    """Writes a model with the layout of Stable Diffusion 3."""
    with torch.random.fork_rng():
        torch.manual_seed(12)
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            pos_embed_max_size=24,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return folder


def write_osediff(folder: Path, *, vae_parts: Sequence[str] = ("encoder",), base: Path | None = None) -> Published:
    """Writes `osediff.pkl`; with the decoder among `vae_parts` as GDPO-SR's training code does."""
    base = base or write_sd21_base(folder / "base")
    unet, vae = _unet(base), _vae(base)
    lists = {part: layers_of(unet, UNET_LAYERS, part) for part in PARTS}
    for part in PARTS:
        _adapt(unet, f"default_{part}", lists[part])
    # As in the authors' list: several rules name the same layer.
    vae_lists = {part: layers_of(vae, VAE_LAYERS, part) for part in vae_parts}
    for part in vae_parts:
        _adapt(vae, f"default_{part}", vae_lists[part])
    unet.set_adapter([f"default_{part}" for part in PARTS])
    vae.set_adapter([f"default_{part}" for part in vae_parts])
    _move([parameter for name, parameter in unet.named_parameters() if "lora" in name or "conv_in.base" in name], 1)
    _move([parameter for name, parameter in vae.named_parameters() if "lora" in name], 2)
    content: dict[str, Any] = {"rank_unet": 4, "rank_vae": 4}
    content |= {f"unet_lora_{part}_modules": lists[part] for part in PARTS}
    content |= {f"vae_lora_{part}_modules": [*vae_lists[part], *vae_lists[part][:2]] for part in vae_parts}
    content["state_dict_unet"] = {
        name: weight for name, weight in unet.state_dict().items() if "lora" in name or "conv_in" in name
    }
    content["state_dict_vae"] = {name: weight for name, weight in vae.state_dict().items() if "lora" in name}
    return _saved(folder / "osediff.pkl", base, content, unet, vae)


def write_pisa_sr(folder: Path) -> Published:
    """Writes `pisa_sr.pkl`."""
    base = write_sd21_base(folder / "base")
    unet = _unet(base)
    content: dict[str, Any] = {}
    for level in ("pix", "sem"):
        content[f"lora_rank_unet_{level}"] = 4
        for part in PARTS:
            # Before the first adapter renames them.
            content[f"unet_lora_{part}_modules_{level}"] = layers_of(_unet(base), UNET_LAYERS, part)
            _adapt(unet, f"default_{part}_{level}", content[f"unet_lora_{part}_modules_{level}"])
    unet.set_adapter([f"default_{part}_{level}" for level in ("pix", "sem") for part in PARTS])
    _move([parameter for name, parameter in unet.named_parameters() if "lora" in name], 3)
    content["state_dict_unet"] = {name: weight for name, weight in unet.state_dict().items() if "lora" in name}
    return _saved(folder / "pisa_sr.pkl", base, content, unet, _vae(base))


def write_hypir(folder: Path) -> Published:
    """Writes `HYPIR_sd2.pth`: one flat state dict, lora_alpha = rank."""
    base = write_sd21_base(folder / "base")
    unet = _unet(base)
    layers = [name for part in PARTS for name in layers_of(unet, UNET_LAYERS, part) if name != "conv_in"]
    _adapt(unet, "default", layers, rank=6, alpha=6)
    _move([parameter for name, parameter in unet.named_parameters() if "lora" in name], 4)
    state = {name: weight for name, weight in unet.state_dict().items() if "lora" in name}
    return _saved(folder / "HYPIR_sd2.pth", base, state, unet, _vae(base))


def write_tsd_sr(folder: Path) -> Published:
    """Writes the folder of TSD-SR."""
    base = write_sd3_base(folder / "base")
    transformer = SD3Transformer2DModel.from_pretrained(base / "transformer")
    vae = _vae(base)
    layers = layers_of(transformer, SD3_LAYERS, "others")
    _adapt(transformer, "default", layers, rank=5, alpha=5)
    _adapt(vae, "default", layers_of(vae, VAE_LAYERS, "encoder"), rank=5, alpha=5)
    _move([parameter for name, parameter in transformer.named_parameters() if "lora" in name], 5)
    _move([parameter for name, parameter in vae.named_parameters() if "lora" in name], 6)
    target = folder / "tsdsr"
    target.mkdir()
    for name, network in (("transformer", transformer), ("vae", vae)):
        state = get_peft_model_state_dict(network, adapter_name="default")
        save_file({f"transformer.{key}": weight for key, weight in state.items()}, target / f"{name}.safetensors")
    source = torch.Generator().manual_seed(7)
    torch.save(torch.randn(1, 9, 12, generator=source), target / "prompt_embeds.pt")
    torch.save(torch.randn(1, 10, generator=source), target / "pool_embeds.pt")
    return Published(target, base, transformer.eval(), vae.eval())


def write_naosd_folder(folder: Path) -> Published:
    """Writes a diffusers folder with everything merged, as GDPO-SR is released."""
    base = write_sd21_base(folder / "base")
    unet, vae = _unet(base), _vae(base)
    _move(list(unet.parameters()), 8, 0.05)
    unet.save_pretrained(folder / "naosd" / "unet")
    vae.save_pretrained(folder / "naosd" / "vae")
    return Published(folder / "naosd", base, unet.eval(), vae.eval())


WRITERS: Mapping[str, Callable[[Path], Published]] = {
    "osediff": write_osediff,
    "pisa_sr": write_pisa_sr,
    "hypir": write_hypir,
    "tsd_sr": write_tsd_sr,
    "naosd": write_naosd_folder,
}


def _saved(path: Path, base: Path, content: Any, unet: nn.Module, vae: nn.Module) -> Published:
    torch.save(content, path)
    return Published(path, base, unet.eval(), vae.eval())  # type: ignore[arg-type]


def _unet(base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base / "unet")


def _vae(base: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(base / "vae")


def layers_of(network: nn.Module, ends: Sequence[str], part: str) -> list[str]:
    """Returns the layers of a part of a network whose names have one of these ends."""
    places = {"encoder": ("down_blocks", "conv_in"), "decoder": ("up_blocks", "conv_out")}
    if isinstance(network, AutoencoderKL):
        places = {"encoder": ("encoder", "quant_conv"), "decoder": ("decoder", "post_quant_conv")}
    names = [
        name
        for name, module in network.named_modules()
        if _is_layer(module) and any(name == end or name.endswith(f".{end}") for end in ends)
    ]
    found = {side: [n for n in names if n.startswith(prefixes)] for side, prefixes in places.items()}
    taken = {name for side in found.values() for name in side}
    return found[part] if part in found else [name for name in names if name not in taken]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _adapt(network: Any, name: str, layers: Sequence[str], *, rank: int = 4, alpha: int | None = None) -> None:
    if not layers:
        return
    # alpha is left to peft where the authors left it, so that a change of its default would show.
    extra: dict[str, Any] = {} if alpha is None else {"lora_alpha": alpha}
    pattern = "|".join(layer.replace(".", r"\.") for layer in layers)
    config = LoraConfig(r=rank, target_modules=f"({pattern})", init_lora_weights="gaussian", **extra)
    network.add_adapter(config, adapter_name=name)


@torch.no_grad()
def _move(parameters: Sequence[nn.Parameter], seed: int, size: float = 0.1) -> None:
    source = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter += size * torch.randn(parameter.shape, generator=source)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<start>", "<end>", "<pad>", "<unk>", "a", "cat", "dog", "clean", "high", "resolution"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=TOKENS,
    )


def null_prompt(base: Path) -> Tensor:
    """Returns the embeddings of the empty prompt by the stock text encoder."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base / "tokenizer")
    tokens = tokenizer("", padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return CLIPTextModel.from_pretrained(base / "text_encoder")(tokens.input_ids)[0]

"""The networks that a recipe names, from their configurations alone: shapes without weights.

What is small and needs code of its own to be opened (the shipped generator, a user's module) is loaded and emptied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreward_trl.cli.building import build_generator, is_module
from refreward_trl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensorMode

    from refreward_trl.generators.base import Generator
    from refreward_trl.generators.families import Family
    from refreward_trl.trainers.arguments import GeneratorArguments
    from refreward_trl.types import RewardFunction

SD21_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD21_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD3_TRANSFORMER = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SD3_VAE = {**SD21_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
STOCK = {
    "UNet2DConditionModel": (SD21_UNET, SD21_VAE),
    "SD3Transformer2DModel": (SD3_TRANSFORMER, SD3_VAE),
}
"""Class of a denoiser -> the configurations of the public base model around it, for who has not downloaded it yet."""

PROMPT_TOKENS = {"UNet2DConditionModel": 77, "SD3Transformer2DModel": 333}


REHEARSED = ("qwen2_5_vl", "qwen3_vl")
"""Families of judges whose forward needs no content of its tensors."""


def generator_without_content(arguments: GeneratorArguments, *, scale: int, mode: FakeTensorMode) -> Generator:
    """Returns the generator of a recipe with fake weights.

    Raises:
        CheckpointError: A configuration is missing or cannot be read.
        ConfigError: As `build_generator`.
    """
    from refreward_trl.generators.folders import HEADER_FILE

    source = Path(arguments.generator)
    published = arguments.generator not in ("default", "new") and not is_module(arguments.generator)
    if published and not (source / HEADER_FILE).is_file():
        generator = _published(arguments, source, mode)
    elif published:
        generator = _saved(source, mode)
    else:
        generator = build_generator(arguments, scale=scale, seed=0)
        _empty(generator, mode)
    if generator.scale != scale:
        raise ConfigError(
            f"the generator enlarges {generator.scale} times, the data {scale} times",
            where="scale",
            fix=f"set scale: {generator.scale}",
        )
    return generator


def reward_without_content(reward: RewardFunction, mode: FakeTensorMode) -> tuple[bool, str | None]:
    """Gives a reward of ours a judge with fake weights.

    Returns:
        Whether the reward can be rehearsed, and what of it is not counted as it is, and why.
    """
    from refreward_trl.rewards.fidelity import LRConsistency, psnr, ssim
    from refreward_trl.rewards.heldout import HeldOutJudge
    from refreward_trl.rewards.refreward import RefReward
    from refreward_trl.trainers.shape_trace import without_content

    if isinstance(reward, RefReward) and reward.ask == "rate":
        judge = rate_judge_without_content(reward.source, mode, reward.dtype, reward.spec)
        reward._judge = judge
        kind = judge.model.config.model_type
        if kind not in REHEARSED:
            return False, f"its weights alone are counted: shapes do not tell what a {kind} computes"
        whole = f"its weights are counted as if they were not quantized to {reward.quantization}"
        return True, whole if reward.quantization else None
    if isinstance(reward, HeldOutJudge):
        without_content(reward.judge, mode)  # type: ignore[arg-type]
        return True, None
    if isinstance(reward, LRConsistency) or getattr(reward, "func", reward) in (psnr, ssim):
        return True, None
    return False, "what it takes is not counted: it cannot be rehearsed on shapes"


def rate_judge_without_content(
    source: str | Path, mode: FakeTensorMode, dtype: Any = None, spec: str | Path | None = None
) -> Any:
    """Returns a judge with fake, frozen weights; an adapter is taken to be merged. Of a name on the hub everything but
    its weights is downloaded.

    Raises:
        CheckpointError: There is no such judge, or its configuration, tokenizer or spec cannot be read.
        SetupError: The hub cannot be reached or does not have it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    from refreward_trl.reward_model.loading import ADAPTER_FILE, SETTINGS, base_of, choose_spec, find_folder
    from refreward_trl.reward_model.scoring import RateJudge
    from refreward_trl.trainers.shape_trace import without_content

    folders = [find_folder(source, SETTINGS)]
    if (folders[0] / ADAPTER_FILE).is_file():
        folders.append(find_folder(base_of(folders[0]), SETTINGS))
    try:
        config = AutoConfig.from_pretrained(folders[-1], local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folders[-1], local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(
                config, dtype=dtype or torch.float32, trust_remote_code=False, attn_implementation="sdpa"
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the judge cannot be built from its configuration ({type(error).__name__}: {_first_line(error)})",
            where=str(folders[-1]),
            fix="give 'default' or the folder of a saved judge",
        ) from error
    used = choose_spec(spec, folders, model, tokenizer)
    model.eval().requires_grad_(False)
    if config.model_type == "qwen3_vl":
        model.model.language_model._deepstack_process = _added_to_the_first
    return RateJudge(without_content(model, mode), tokenizer, used)  # type: ignore[arg-type]


def _added_to_the_first(hidden_states: Tensor, mask: Tensor, embeds: Tensor) -> Tensor:
    """Adds features to as many tokens as there are: of the mask that says to which, shapes do not tell the number."""
    tokens = hidden_states.clone().flatten(0, 1)
    tokens[: len(embeds)] = tokens[: len(embeds)] + embeds
    return tokens.view_as(hidden_states)


def _saved(folder: Path, mode: FakeTensorMode) -> Generator:
    """Builds what `save_pretrained` wrote, without its weights; a policy that it has is there again."""
    from refreward_trl.generators.diffusers_folder import DENOISER_FOLDERS
    from refreward_trl.generators.folders import PROMPT_FILE, read_class_name, read_numbers, read_safetensors
    from refreward_trl.generators.prompts import PromptEmbeds
    from refreward_trl.generators.published import CLASSES

    name = read_class_name(folder)
    if name not in CLASSES:
        raise CheckpointError(
            f"a {name} cannot be opened by its folder alone",
            where=str(folder),
            fix="load it as package.module:attribute" if name == "ModuleGenerator" else f"known: {', '.join(CLASSES)}",
        )
    kind: Any = CLASSES[name]
    numbers = {key: value for key, value in read_numbers(folder, name).items() if key != "origin"}
    place = folder / DENOISER_FOLDERS[kind.denoiser_class]
    denoiser = _network(kind.denoiser_class, _config(place), mode)
    vae = _vae(_config(folder / "vae"), mode)
    prompts = read_safetensors(folder / PROMPT_FILE)
    prompt = PromptEmbeds(prompts["prompt_embeds"], prompts.get("pooled_embeds"))
    pixel = folder / "pixel_unet"
    further = {"pixel_denoiser": _network(kind.denoiser_class, _config(pixel), mode)} if pixel.is_dir() else {}
    generator = kind(denoiser, vae, kind.config_class(**numbers), prompt, **further)
    if (folder / "policy").is_dir():
        generator.add_policy_adapter(_saved_lora(folder / "policy"))
        _empty(generator, mode)
    return generator


def _saved_lora(folder: Path) -> Any:
    """Reads rank and layers of a saved policy from the shapes of its weights."""
    from peft import LoraConfig
    from safetensors import safe_open

    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if ".lora_A." in name]  # noqa: SIM118
        rank = int(file.get_slice(names[0]).get_shape()[0])
    layers = [name.partition(".lora_A.")[0].removeprefix("unet.").removeprefix("transformer.") for name in names]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)


def _published(arguments: GeneratorArguments, source: Path, mode: FakeTensorMode) -> Generator:
    """Builds a published generator on the configurations of its base model.

    Its updates are merged into the base when it is loaded, so its size is the base's. A base model that is not a local
    folder is taken to be the public one.
    """
    import torch

    from refreward_trl.generators.diffusers_folder import DENOISER_FOLDERS
    from refreward_trl.generators.prompts import PromptEmbeds
    from refreward_trl.generators.published import CLASSES

    about = _family(arguments, source)
    kind: Any = CLASSES[about.generator]
    name = kind.denoiser_class.__name__
    folder = Path(arguments.base_model) if arguments.base_model else source
    part = folder / DENOISER_FOLDERS[kind.denoiser_class]
    if part.is_dir():
        denoiser, vae = _network(kind.denoiser_class, _config(part), mode), _vae(_config(folder / "vae"), mode)
    else:
        stock_denoiser, stock_vae = STOCK[name]
        denoiser = _network(kind.denoiser_class, stock_denoiser, mode)
        vae = _vae({**stock_vae, "_class_name": "AutoencoderKL"}, mode)
    config = denoiser.config
    pooled = None
    width = config.get("cross_attention_dim")
    if name == "SD3Transformer2DModel":
        width, pooled = config["joint_attention_dim"], torch.zeros(1, config["pooled_projection_dim"])
    prompt = PromptEmbeds(torch.zeros(1, PROMPT_TOKENS[name], width), pooled)
    numbers = {"latent_scale": vae.config["scaling_factor"], **about.numbers}
    if arguments.color_fix is not None:
        numbers["color_fix"] = arguments.color_fix
    return kind(denoiser, vae, kind.config_class(**numbers), prompt)


def _family(arguments: GeneratorArguments, source: Path) -> Family:
    from refreward_trl.generators.families import FAMILIES, family_of

    if arguments.generator_family is not None:
        return family_of(arguments.generator_family)
    for name in FAMILIES:
        if name.replace("_", "") in source.name.lower().replace("_", "").replace("-", ""):
            return family_of(name)
    if source.is_file():
        from refreward_trl.generators.published import _format_of

        return family_of(_format_of(source) or "")
    raise CheckpointError(
        "there is no such generator, and its name tells no family",
        where=str(source),
        fix=f"set generator_family: {', '.join(FAMILIES)}",
    )


def _empty(generator: Generator, mode: FakeTensorMode) -> None:
    from refreward_trl.trainers.shape_trace import without_content

    for name in ("denoiser", "vae", "pixel_denoiser"):
        network = getattr(generator, name, None)
        if network is not None:
            without_content(network, mode)


def _network(kind: Any, config: dict[str, Any], mode: FakeTensorMode) -> Any:
    import inspect

    import torch

    from refreward_trl.trainers.shape_trace import without_content

    known = inspect.signature(kind).parameters
    with torch.device("meta"):
        network = kind(**{name: value for name, value in config.items() if name in known}).eval()
    return without_content(network, mode)


def _vae(config: dict[str, Any], mode: FakeTensorMode) -> Any:
    from refreward_trl.generators.diffusers_folder import VAE_CLASSES

    name = config.get("_class_name")
    if name not in VAE_CLASSES:
        raise CheckpointError(f"the VAE is a {name!r}", where="vae", fix=f"supported: {', '.join(VAE_CLASSES)}")
    return _network(VAE_CLASSES[name], config, mode)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot be read: {_first_line(error)}", where=str(path), fix="copy the whole folder again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]

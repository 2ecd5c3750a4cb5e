"""Published one-step generators: read in their authors' formats, put onto their base models, written back.

A checkpoint's updates are merged into the base when it is read. What trains on top is one adapter, "policy", as on any
other generator, and the reference is the published model itself. The file's own tensors are kept, so that a policy can
be written back in the same format.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refreward_trl.checksums import digest
from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.generators.base import POLICY_ADAPTER
from refreward_trl.generators.base_models import check_base_model, find_base_model
from refreward_trl.generators.diffusers_folder import DENOISER_FOLDERS, read_model, read_vae, without_adapter
from refreward_trl.generators.epsilon import EpsLatentGenerator
from refreward_trl.generators.families import Family, family_of
from refreward_trl.generators.flow import FlowLatentGenerator
from refreward_trl.generators.latent import LatentGenerator
from refreward_trl.generators.low_rank import merge, policy_updates
from refreward_trl.generators.origin import Origin, Updates
from refreward_trl.generators.prompts import PromptEmbeds, PromptEncoder, read_prompt_embeds
from refreward_trl.generators.published import flat, osediff, pisa_sr
from refreward_trl.generators.residual import ResidualLatentGenerator
from refreward_trl.generators.torch_pickles import read_torch_file

FORMATS: dict[str, Any] = {"osediff": osediff, "pisa_sr": pisa_sr, "hypir": flat.Hypir, "tsd_sr": flat.TsdSr}
"""Name of a file format -> what reads and writes it."""

CLASSES: dict[str, type[LatentGenerator]] = {
    "EpsLatentGenerator": EpsLatentGenerator,
    "ResidualLatentGenerator": ResidualLatentGenerator,
    "FlowLatentGenerator": FlowLatentGenerator,
}

PICKLES = (".pkl", ".pth", ".pt", ".ckpt", ".bin")


def is_published(source: Path) -> bool:
    """Tells whether a path is a checkpoint in an authors' format, or a merged diffusers folder."""
    if source.is_file():
        return source.suffix in PICKLES
    return _is_tsd_folder(source) or _is_merged(source)


def load_published(
    source: Path,
    *,
    family: str | None = None,
    base_model: str | None = None,
    prompt: str | None = None,
    prompt_embeds: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> LatentGenerator:
    """Loads a published checkpoint.

    Args:
        source: `osediff.pkl`, `pisa_sr.pkl`, `HYPIR_sd2.pth`, the folder of TSD-SR, or a diffusers folder into which
            everything has been merged.
        family: Name of the family; needed for a merged folder, which does not say it.
        base_model: Folder or hub id of the base model; None tries the known mirrors.
        prompt: The fixed prompt, instead of the family's.
        prompt_embeds: File of its embeddings, so that no text encoder is needed.
        dtype: Of denoiser and VAE; updates are merged in float32.
        **overrides: Fields of the generator's config to use instead of the family's.

    Raises:
        CheckpointError: The file is damaged, holds code, is of no known format, or does not fit the base model.
        SetupError: The base model cannot be found.
        ConfigError: The family does not fit the format, or an option is wrong.
    """
    file_format = _format_of(source)
    about = _family(file_format, family, source)
    if file_format is None:
        parts = _read_networks(source, about)
        base = source if base_model is None else find_base_model(about.base, base_model)
        put = _Put()
    else:
        base = find_base_model(about.base, base_model)
        check_base_model(about.base, base)
        parts = _read_networks(base, about)
        put = _put_on(source, file_format, about, parts, overrides)
    denoiser, vae = (part.to(dtype) for part in parts)
    mark = "" if file_format is None else digest(denoiser.state_dict())
    origin = Origin(about.name, file_format, str(base_model or base), put.facts, put.tensors, mark)
    encoder = PromptEncoder(lambda: base)
    fixed = read_prompt_embeds(Path(prompt_embeds)) if prompt_embeds is not None else put.prompt
    if fixed is None or prompt is not None:
        fixed = encoder([(about.prompt or "") if prompt is None else prompt])
        encoder.release()
    generator_class = CLASSES[about.generator]
    numbers = {"latent_scale": vae.config["scaling_factor"], **about.numbers}
    config = generator_class.config_class(**numbers).replaced(overrides)
    further = {name: network.to(dtype) for name, network in put.further.items()}
    try:
        generator = generator_class(denoiser, vae, config, fixed, origin=origin, **further)
    except ConfigError as error:
        raise CheckpointError(
            f"the parts of the generator do not fit each other: {error.what}", where=str(source), fix=error.fix
        ) from error
    generator.prompt_encoder = encoder
    generator.check_dtype(dtype)
    return generator


def write_published(generator: LatentGenerator, target: Path) -> None:
    """Writes a generator in the format of the checkpoint that it was made of, with its policy.

    Args:
        generator: With or without a policy; its other weights must be as they were loaded.
        target: The file, or the folder of TSD-SR.

    Raises:
        ConfigError: It was made of no such checkpoint, or more than its adapter was trained, or the policy changes
            layers that the format has no place for.
    """
    origin = generator.origin
    if origin is None or origin.file_format is None:
        raise ConfigError(
            "it was not made of a published checkpoint in a format of its own",
            where="export",
            fix="export to a diffusers folder or a LoRA file",
        )
    if digest(without_adapter(generator.denoiser.state_dict())) != origin.digest:
        raise ConfigError(
            "its weights are not those of the checkpoint any more: all of them were trained, or the policy was merged,"
            f" which the low-rank format {origin.file_format} cannot hold",
            where="export",
            fix="export to a diffusers folder, or train an adapter (use_peft: true)",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = FORMATS[origin.file_format]
    writer.write(target, dict(origin.facts), origin.tensors, policy_updates(generator.denoiser, POLICY_ADAPTER))


@dataclass
class _Put:
    """What a checkpoint says besides the updates that have been merged."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    prompt: PromptEmbeds | None = None
    further: dict[str, nn.Module] = field(default_factory=dict)


def _put_on(
    source: Path, file_format: str, about: Family, parts: tuple[Any, Any], overrides: Mapping[str, Any]
) -> _Put:
    """Merges a checkpoint into its base, in place."""
    denoiser, vae = parts
    reader = FORMATS[file_format]
    facts, tensors = reader.read(source)
    updates: Updates = reader.updates(facts, tensors, source)
    # Whole weights first: they are the base of the adapter on the same layer.
    _replace(denoiser, updates.replaced, source, about)
    put = _Put(facts, tensors, updates.prompt)
    strengths = {overrides.get(f"{level}_strength", 1.0) for level in ("pixel", "semantic")}
    for number, adapter in enumerate(updates.denoiser):
        if file_format == "pisa_sr" and number == len(updates.denoiser) // 2 and len(strengths) == 2:
            put.further["pixel_denoiser"] = copy.deepcopy(denoiser)
        merge(denoiser, adapter, where=str(source), base=about.base.title)
    for adapter in updates.vae:
        merge(vae, adapter, where=str(source), base=f"the VAE of {about.base.title}")
    return put


def _replace(network: nn.Module, weights: Mapping[str, Tensor], source: Path, about: Family) -> None:
    own = dict(network.named_parameters())
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            found = tuple(own[name].shape) if name in own else "missing"
            raise CheckpointError(
                f"it was trained on another base model: {name} is {found} in {about.base.title}, "
                f"{tuple(weight.shape)} in the checkpoint",
                where=str(source),
                fix="name the base model that the checkpoint was trained on",
            )
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)


def _read_networks(folder: Path, about: Family) -> tuple[Any, Any]:
    denoiser_class = CLASSES[about.generator].denoiser_class
    return (
        read_model(denoiser_class, folder / DENOISER_FOLDERS[denoiser_class], torch.float32),
        read_vae(folder / "vae", torch.float32),
    )


def _format_of(source: Path) -> str | None:
    """Returns the name of the file format; None for a merged folder."""
    if source.is_dir():
        return "tsd_sr" if _is_tsd_folder(source) else None
    content = read_torch_file(source)
    for name in ("osediff", "pisa_sr", "hypir"):
        if FORMATS[name].matches(content):
            return name
    raise CheckpointError(
        f"it is of no known format; its first keys are {', '.join(map(str, list(content)[:3]))}",
        where=str(source),
        fix="known are osediff.pkl, pisa_sr.pkl, HYPIR_sd2.pth, the folder of TSD-SR, and merged diffusers folders",
    )


def _family(file_format: str | None, wanted: str | None, source: Path) -> Family:
    if file_format is None:
        if wanted is None:
            raise ConfigError(
                "a diffusers folder does not say which family it is of",
                where=str(source),
                fix="set generator_family, for example naosd",
            )
        return family_of(wanted)
    about = family_of(wanted or file_format)
    # GDPO-SR's training code writes OSEDiff's format.
    if about.name != file_format and (about.name, file_format) != ("naosd", "osediff"):
        raise ConfigError(
            f"the file is in the format of {file_format}, not of {about.name}",
            where="generator_family",
            fix=f"leave it out, or use {file_format}",
        )
    return about


def _is_tsd_folder(source: Path) -> bool:
    return all((source / name).is_file() for name in flat.TSD_FILES.values())


def _is_merged(source: Path) -> bool:
    return (source / "vae").is_dir() and any((source / name).is_dir() for name in DENOISER_FOLDERS.values())

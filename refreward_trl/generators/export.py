"""Takes a generator to other programs."""

from __future__ import annotations

from pathlib import Path

from refreward_trl.errors import ConfigError
from refreward_trl.generators.base import Generator
from refreward_trl.generators.diffusers_folder import write_policy
from refreward_trl.generators.latent import LatentGenerator
from refreward_trl.generators.published import write_published

FORMATS = ("published", "lora", "diffusers")


def export_generator(generator: Generator, target: Path, file_format: str) -> None:
    """Writes a generator in a format of others.

    Args:
        generator: A latent generator. For "diffusers" its policy is merged into it, for good.
        target: The file or folder to write.
        file_format: "published", the format of the checkpoint it was made of (see `write_published`); "lora", the
            policy as stock diffusers reads it; or "diffusers", a merged folder.

    Raises:
        ConfigError: The generator cannot be written in this format, or the format is unknown.
    """
    if not isinstance(generator, LatentGenerator):
        raise ConfigError(
            f"a {type(generator).__name__} has no format of others",
            where="export",
            fix="its weights are in model.safetensors of its folder",
        )
    if file_format == "published":
        write_published(generator, target)
    elif file_format == "lora":
        if not generator.has_policy_adapter:
            raise ConfigError(
                "it has no trained adapter", where="export", fix="export a generator that was trained with use_peft"
            )
        write_policy(target, generator.denoiser, generator.denoiser.state_dict())
    elif file_format == "diffusers":
        if generator.has_policy_adapter:
            generator.merge_policy()
        generator.save_pretrained(target)
    else:
        raise ConfigError(f"unknown format {file_format!r}", where="export", fix=f"use one of {', '.join(FORMATS)}")

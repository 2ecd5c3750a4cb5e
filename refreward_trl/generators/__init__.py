"""One-step SR generators, and the policies around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.generators.base import Condition, Generator, straight_through_clamp
from refreward_trl.generators.folders import HEADER_FILE, PROMPT_FILE, read_class_name
from refreward_trl.generators.policies import GaussianLatentPolicy

__all__ = ["Condition", "GaussianLatentPolicy", "Generator", "load_generator", "straight_through_clamp"]

DEFAULT_FOLDER = Path(__file__).parent.parent / "assets" / "generator"


PUBLISHED_OPTIONS = ("family", "base_model", "prompt", "prompt_embeds")
"""Settings that only mean something for a published checkpoint."""


def load_generator(source: str | Path, **overrides: Any) -> Generator:
    """Loads a generator by what a recipe calls it.

    Args:
        source: "default" (the shipped one), the folder of a saved generator, a published checkpoint (`osediff.pkl`,
            `pisa_sr.pkl`, `HYPIR_sd2.pth`, the folder of TSD-SR, a merged diffusers folder), or
            "package.module:attribute" naming an `nn.Module` LR -> SR (an instance, a class or a function that makes
            one), which becomes a `ModuleGenerator`.
        **overrides: Settings to use instead of the saved ones, such as `color_fix`, and `dtype`; those that are None
            are left alone. For a published checkpoint also those of `published.load_published`: `family`,
            `base_model`, `prompt`, `prompt_embeds`. For a module: `scale` and `weights`.

    Raises:
        CheckpointError: If the folder or file is missing or cannot be read.
        SetupError: If the base model of a published checkpoint cannot be found.
        ConfigError: If an override or the module's name is wrong.
    """
    settings = {name: value for name, value in overrides.items() if value is not None}
    if source == "default":
        return _load_folder(DEFAULT_FOLDER, settings)
    path = Path(source)
    if any((path / name).is_file() for name in (HEADER_FILE, PROMPT_FILE)):
        return _load_folder(path, settings)
    if path.exists():
        from refreward_trl.generators.published import is_published, load_published

        if is_published(path):
            return load_published(path, **settings)
    if path.is_dir():
        return _load_folder(path, settings)
    if ":" in str(source):
        from refreward_trl.generators.module import load_module_generator

        _refuse_published_options(settings, str(source))
        return load_module_generator(str(source), **settings)
    raise CheckpointError(
        "there is no such generator",
        where=str(source),
        fix='use "default", the folder of a saved generator, a published checkpoint, or package.module:attribute for '
        "an nn.Module",
    )


def _load_folder(folder: Path, settings: dict[str, Any]) -> Generator:
    from refreward_trl.generators.published import CLASSES

    name = read_class_name(folder)
    if name == "ModuleGenerator":
        raise ConfigError(
            "the folder holds only the weights of an nn.Module, not its code",
            where=str(folder),
            fix="load it as package.module:attribute with weights=<this folder>",
        )
    if name not in CLASSES:
        raise CheckpointError(
            f"unknown generator class {name!r}", where=str(folder), fix=f"this version knows {', '.join(CLASSES)}"
        )
    _refuse_published_options(settings, str(folder))
    return CLASSES[name].from_pretrained(folder, **settings)


def _refuse_published_options(settings: dict[str, Any], source: str) -> None:
    for name in PUBLISHED_OPTIONS:
        if name in settings:
            raise ConfigError(
                f"{name} is {settings[name]!r}, but {source} is no published checkpoint",
                where=name,
                fix="leave it out: a saved generator holds what it needs",
            )

"""One-step SR generators, and the policies around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.generators.base import Condition, Generator, straight_through_clamp
from refreward_trl.generators.policies import GaussianLatentPolicy

__all__ = ["Condition", "GaussianLatentPolicy", "Generator", "load_generator", "straight_through_clamp"]

DEFAULT_FOLDER = Path(__file__).parent.parent / "assets" / "generator"


def load_generator(source: str | Path, **overrides: Any) -> Generator:
    """Loads a generator by what a recipe calls it.

    Args:
        source: "default" (the shipped one), the folder of a saved generator, or "package.module:attribute" naming an
            `nn.Module` LR -> SR (an instance, a class or a function that makes one), which becomes a
            `ModuleGenerator`.
        **overrides: Settings to use instead of the saved ones, such as `color_fix`; those that are None are left
            alone. For a module: `scale` and `weights`.

    Raises:
        CheckpointError: If the folder is missing or cannot be read.
        ConfigError: If an override or the module's name is wrong.
    """
    settings = {name: value for name, value in overrides.items() if value is not None}
    if source == "default":
        return _load_folder(DEFAULT_FOLDER, settings)
    if Path(source).is_dir():
        return _load_folder(Path(source), settings)
    if ":" in str(source):
        from refreward_trl.generators.module import load_module_generator

        return load_module_generator(str(source), **settings)
    raise CheckpointError(
        "there is no such generator",
        where=str(source),
        fix='use "default", the folder of a saved generator, or package.module:attribute for an nn.Module',
    )


def _load_folder(folder: Path, settings: dict[str, Any]) -> Generator:
    from refreward_trl.generators.epsilon import EpsLatentGenerator
    from refreward_trl.generators.folders import read_class_name

    classes = {"EpsLatentGenerator": EpsLatentGenerator}
    name = read_class_name(folder)
    if name == "ModuleGenerator":
        raise ConfigError(
            "the folder holds only the weights of an nn.Module, not its code",
            where=str(folder),
            fix="load it as package.module:attribute with weights=<this folder>",
        )
    if name not in classes:
        raise CheckpointError(
            f"unknown generator class {name!r}", where=str(folder), fix=f"this version knows {', '.join(classes)}"
        )
    return classes[name].from_pretrained(folder, **settings)

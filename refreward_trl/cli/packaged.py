"""Where recipes and launch files are: in a wheel inside the package, in a checkout at the top of the repository."""

from __future__ import annotations

from pathlib import Path

from refreward_trl.cli.parser import did_you_mean
from refreward_trl.errors import ConfigError

RECIPES = "recipes"
LAUNCH_FILES = "deepspeed_configs"


def packaged_folder(name: str) -> Path:
    """Returns the folder `recipes` or `deepspeed_configs` that came with the package."""
    package = Path(__file__).resolve().parent.parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def recipe_names() -> list[str]:
    """Returns the names of the packaged recipes, e.g. `tiny/refl`."""
    root = packaged_folder(RECIPES)
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def launch_file_names() -> list[str]:
    """Returns the names of the packaged launch files, e.g. `zero2.yaml`."""
    return sorted(path.name for path in packaged_folder(LAUNCH_FILES).iterdir() if path.suffix in (".yaml", ".json"))


def find_recipe(source: str) -> Path:
    """Returns the file of a recipe.

    Args:
        source: A path, relative to the current folder; or, where no such file is, a packaged recipe, as `tiny/refl` or
            `recipes/tiny/refl.yaml`.

    Raises:
        ConfigError: There is neither.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError("this is a folder, not a recipe", where=source, fix="name a .yaml file in it")
    name = source.removeprefix(f"{RECIPES}/").removesuffix(".yaml")
    if name in recipe_names():
        return packaged_folder(RECIPES) / f"{name}.yaml"
    raise ConfigError(
        f"there is no such file, and no packaged recipe of this name{did_you_mean(name, recipe_names())}",
        where=source,
        fix="`refreward recipes list` shows the packaged recipes",
    )

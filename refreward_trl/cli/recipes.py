"""`refreward recipes`: the recipes and launch files that come with the package, and a strict check of any recipe."""

from __future__ import annotations

from pathlib import Path

from refreward_trl.cli.keys import METHODS
from refreward_trl.cli.packaged import (
    LAUNCH_FILES,
    RECIPES,
    find_recipe,
    launch_file_names,
    packaged_folder,
    recipe_names,
)
from refreward_trl.cli.parser import CommandParser, did_you_mean
from refreward_trl.cli.recipe import read_recipe
from refreward_trl.errors import ConfigError

DESCRIPTION = """List, show, copy or check recipes.

  list           the packaged recipes and launch files
  show NAME      print one, as it is
  copy [NAME..]  copy some (default: all) to recipes/ and deepspeed_configs/ under --to
  check [FILE..] check some (default: all packaged ones) for unknown keys, wrong types and values out of range"""


def main(argv: list[str]) -> None:
    """Runs one of the four actions."""
    parser = CommandParser("recipes", DESCRIPTION, "refreward recipes copy tiny/refl --to my_experiment")
    parser.add_argument("action", choices=["list", "show", "copy", "check"], metavar="list|show|copy|check")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a packaged name such as tiny/refl, or a file")
    parser.add_argument("--to", default=".", metavar="FOLDER", help="copy: where to (default: here)")
    parser.add_argument("--force", action="store_true", help="copy: overwrite files that exist")
    parser.add_argument("--method", choices=METHODS, help="check: the command a recipe without `method:` is for")
    arguments = parser.parse_words(argv)
    if arguments.action == "list":
        _list()
    elif arguments.action == "show":
        _show(arguments.names)
    elif arguments.action == "copy":
        _copy(arguments.names, Path(arguments.to), arguments.force)
    else:
        _check(arguments.names, arguments.method)


def _list() -> None:
    methods = max(len(read_recipe(name).method) for name in recipe_names())
    width = max(map(len, [*recipe_names(), *launch_file_names()]))
    print(f"recipes ({packaged_folder(RECIPES)})")
    for name in recipe_names():
        recipe = read_recipe(name)
        print(f"  {name:<{width}} refreward {recipe.method:<{methods}} {_first_comment(find_recipe(name))}")
    print(f"\nlaunch files ({packaged_folder(LAUNCH_FILES)})")
    for name in launch_file_names():
        print(f"  {name:<{width}} {_first_comment(packaged_folder(LAUNCH_FILES) / name)}")


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _show(names: list[str]) -> None:
    if not names:
        raise ConfigError(
            "name what to show", where="refreward recipes show", fix="`refreward recipes list` shows the names"
        )
    for name in names:
        print(_file(name).read_text(encoding="utf-8"), end="")


def _copy(names: list[str], folder: Path, force: bool) -> None:
    sources = [_file(name) for name in names or [*recipe_names(), *launch_file_names()]]
    targets = [folder / _relative(source) for source in sources]
    existing = [str(target) for target in targets if target.exists()]
    if existing and not force:
        raise ConfigError(
            f"already there: {', '.join(existing)}",
            where="refreward recipes copy",
            fix="copy elsewhere with --to FOLDER, or overwrite with --force",
        )
    for source, target in zip(sources, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        print(target)


def _file(name: str) -> Path:
    launch_name = name.removeprefix(f"{LAUNCH_FILES}/")
    if launch_name in launch_file_names():
        return packaged_folder(LAUNCH_FILES) / launch_name
    known = [*recipe_names(), *launch_file_names()]
    recipe_name = name.removeprefix(f"{RECIPES}/").removesuffix(".yaml")
    if recipe_name not in recipe_names():
        raise ConfigError(
            f"nothing of this name comes with the package{did_you_mean(name, known)}",
            where=name,
            fix="`refreward recipes list` shows the names",
        )
    return packaged_folder(RECIPES) / f"{recipe_name}.yaml"


def _relative(source: Path) -> Path:
    for name in (RECIPES, LAUNCH_FILES):
        if source.is_relative_to(packaged_folder(name)):
            return Path(name) / source.relative_to(packaged_folder(name))
    raise AssertionError(source)


def _check(names: list[str], method: str | None) -> None:
    problems = []
    for name in names or recipe_names():
        try:
            recipe = read_recipe(name, method=method)
        except ConfigError as error:
            problems.append(error)
            continue
        print(f"{name}: ok, {len(recipe.values)} settings for `refreward {recipe.method}`")
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(
            "\n".join([f"{len(problems)} recipes have problems", *(str(problem) for problem in problems)])
        )

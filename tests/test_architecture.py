"""The order of the layers: data flows one way, siblings do not know each other, and nothing goes round in a circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import refreward_trl

PACKAGE = Path(refreward_trl.__file__).parent

# From the bottom to the top; a part may import from the layers below its own.
LAYERS = (
    {"errors", "randomness", "signals", "checksums", "torch_files"},
    {"types", "resampling", "checkpointing", "model_folders"},
    {"objectives", "data", "generators", "reward_model"},
    {"rewards"},
    {"trainers", "callbacks", "evaluation", "serving"},
    {"cli"},
)
# A trainer adds its callbacks; a callback's annotations name its trainer. Nothing else crosses a layer sideways.
SIDEWAYS = {("trainers", "callbacks")}
SIDEWAYS_TYPES = {("callbacks", "trainers")}
TOP = {"__init__", "__main__"}


def level(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        yield name.removesuffix(".__init__"), path


def parsed(path: Path, *, for_types: bool) -> ast.Module:
    """Parses a module; without `for_types` what only a type checker imports is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not for_types:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    return tree


def imported(path: Path, *, for_types: bool) -> Iterator[str]:
    """Yields what a module imports from the package, as dotted names without the package's own; lazy imports too."""
    for node in ast.walk(parsed(path, for_types=for_types)):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("refreward_trl.")
            )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            if node.module == "refreward_trl":
                yield from (alias.name for alias in node.names)
            elif node.module is not None and node.module.startswith("refreward_trl."):
                yield node.module.partition(".")[2]


def edges(*, for_types: bool) -> list[tuple[str, str]]:
    """Returns (module, imported module) for the whole package but its top."""
    return sorted(
        {
            (name, target)
            for name, path in modules()
            if name not in TOP
            for target in imported(path, for_types=for_types)
        }
    )


def test_every_part_has_its_place():
    parts = {name.partition(".")[0] for name, _ in modules()} - TOP
    assert parts <= set().union(*LAYERS)
    assert {"cli", "data", "generators", "rewards", "errors"} <= parts


@pytest.mark.parametrize(
    ("for_types", "sideways"), [(False, SIDEWAYS), (True, SIDEWAYS | SIDEWAYS_TYPES)], ids=["run", "types"]
)
def test_imports_go_down(for_types, sideways):
    wrong = []
    for module, target in edges(for_types=for_types):
        part, other = module.partition(".")[0], target.partition(".")[0]
        if other != "__version__" and part != other and (part, other) not in sideways and level(other) >= level(part):
            wrong.append(f"{module} imports {target}")
    assert not wrong


def test_parts_do_not_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for module, target in edges(for_types=False):
        part, other = module.partition(".")[0], target.partition(".")[0]
        if part != other:
            graph.setdefault(part, set()).add(other)
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_modules_do_not_import_each_other_in_a_circle():
    names = {name for name, _ in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in modules():
        # What a type checker alone imports, and what a function imports when it runs, closes no circle.
        body = ast.parse(path.read_text(encoding="utf-8")).body
        top = ast.Module([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        for node in ast.walk(top):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("refreward_trl"):
                base = node.module.partition(".")[2]
                found = {f"{base}.{alias.name}".lstrip(".") for alias in node.names} & names
                graph.setdefault(name, set()).update((found or {base}) - {name, ""})
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_no_drawer_without_a_name():
    names = {path.stem for _, path in modules()}
    assert not names & {"utils", "helpers", "misc", "common"}


@pytest.mark.parametrize(
    "name", ["__init__", "errors", "randomness", "signals", *(n for n, _ in modules() if n.startswith("cli"))]
)
def test_light_modules_import_nothing_heavy_at_the_top(name):
    path = dict(modules()).get(name) or PACKAGE / f"{name}.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            found = [node.module]
        for module in found:
            assert module.partition(".")[0] not in {
                "torch",
                "transformers",
                "trl",
                "diffusers",
                "peft",
                "datasets",
                "numpy",
            }


@pytest.mark.parametrize("name", [n for n, _ in modules() if n.split(".")[0] in ("rewards", "data")])
def test_rewards_and_data_start_without_trainers_and_datasets(name):
    path = dict(modules())[name]
    body = ast.parse(path.read_text(encoding="utf-8")).body
    found = {node.module.partition(".")[0] for node in body if isinstance(node, ast.ImportFrom) and node.module}
    found |= {alias.name.partition(".")[0] for node in body if isinstance(node, ast.Import) for alias in node.names}
    assert not found & {"datasets", "trl", "peft", "diffusers", "deepspeed"}

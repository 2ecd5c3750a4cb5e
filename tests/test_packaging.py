"""The metadata says what the tree holds, and a wheel carries everything a command needs."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import refreward_trl
from refreward_trl.cli.packaged import launch_file_names, recipe_names

ROOT = Path(__file__).parent.parent
PACKAGE = Path(refreward_trl.__file__).parent
SHORT = ["--max_steps=1", "--per_device_train_batch_size=1", "--crop_size=64", "--max_eval_images=1"]
SHORT += ["--save_strategy=no", "--eval_strategy=no", "--eval_on_start=false", "--load_best_model_at_end=false"]


@pytest.fixture(scope="module")
def metadata() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(metadata: configparser.ConfigParser) -> dict[str, str]:
    lines = metadata["options"]["install_requires"].split()
    for extra in metadata["options.extras_require"].values():
        lines += extra.split()
    return {re.split(r"[\[<>=]", line)[0]: line for line in lines}


def test_every_package_is_listed(metadata):
    folders = {path.parent.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py")}
    code = {".".join(folder.parts) for folder in folders}
    listed = set(metadata["options"]["packages"].split())
    assert listed == code | {"refreward_trl", "refreward_trl.recipes", "refreward_trl.deepspeed_configs"}


def test_the_version_is_the_packages_own(metadata):
    assert metadata["metadata"]["version"] == "attr: refreward_trl.__version__"


def test_what_breaks_a_cpu_torch_is_no_dependency(metadata):
    assert not {"torchvision", "pyiqa", "lpips", "piq", "timm"} & set(requirements(metadata))


def test_the_cpu_set_fits_the_bounds(metadata):
    from packaging.requirements import Requirement

    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints/cpu.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    wanted = {name: Requirement(line) for name, line in requirements(metadata).items()}
    assert set(wanted) <= set(pinned)
    for name, requirement in wanted.items():
        assert requirement.specifier.contains(pinned[name]), name


def test_the_oldest_trl_that_is_supported_is_the_tested_one(metadata):
    """Its contracts change with every minor version; tests/rewards/test_trl_contract.py runs in this one."""
    from trl import __version__

    assert f"trl>={__version__.rpartition('.')[0]}" in requirements(metadata)["trl"]


def test_what_the_package_imports_is_declared(metadata):
    declared = {name.replace("-", "_").lower() for name in requirements(metadata)} | {"yaml", "PIL", "refreward_trl"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    # A tracker is there when the user asks for it by `report_to`, spandrel by `spandrel:FILE`.
    assert found - set(sys.stdlib_module_names) - declared <= {"trackio", "wandb", "spandrel"}


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder_lists_copies_checks_and_launches_recipes(tmp_path):
    # From a copy: a build leaves files behind, and the next one would pack them again.
    source = tmp_path / "source"
    for name in ("refreward_trl", "recipes", "deepspeed_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {f"refreward_trl/recipes/{name}.yaml" for name in recipe_names()} <= names
    assert {f"refreward_trl/deepspeed_configs/{name}" for name in launch_file_names()} <= names
    assert {"refreward_trl/py.typed", "refreward_trl/cli/schema.json"} <= names
    shipped = {
        path.relative_to(PACKAGE.parent).as_posix() for path in (PACKAGE / "assets").rglob("*") if path.is_file()
    }
    assert shipped <= names
    assert not any(name.startswith(("tests/", "recipes/")) for name in names)

    empty = tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    for words, expected in (
        (["recipes", "list"], str(tmp_path / "site" / "refreward_trl" / "recipes")),
        (["recipes", "copy"], "recipes/tiny/refl.yaml"),
        (["recipes", "check", "recipes/tiny/refl.yaml"], "recipes/tiny/refl.yaml: ok"),
        (["refl", "--config", "tiny/refl", *SHORT], "wrote runs/tiny/refl/summary.json"),
    ):
        command = [sys.executable, "-m", "refreward_trl", *words]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=True)
        assert expected in done.stdout

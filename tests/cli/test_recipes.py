from __future__ import annotations

import json
import re
import shlex

import pytest
import yaml

from refreward_trl.cli import app
from refreward_trl.cli.packaged import find_recipe, launch_file_names, packaged_folder, recipe_names
from refreward_trl.cli.recipe import read_recipe


def run(capsys, *words: str) -> str:
    assert app.main(["recipes", *words]) == 0
    return capsys.readouterr().out


def test_list_names_every_recipe_and_launch_file(capsys):
    listed = run(capsys, "list")
    assert all(f"  {name} " in listed for name in [*recipe_names(), *launch_file_names()])
    recipes = [line for line in listed.splitlines() if (line.split() or [""])[0] in recipe_names()]
    columns = {line.index(" refreward ") for line in recipes}
    assert len(columns) == 1, "the names stand in one column"


@pytest.mark.parametrize("name", ["tiny/refl", "recipes/tiny/refl.yaml"])
def test_show_prints_the_file(name, capsys):
    assert run(capsys, "show", name) == find_recipe("tiny/refl").read_text(encoding="utf-8")


def test_copy_keeps_the_paths_that_the_commands_in_them_use(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(capsys, "copy")
    copied = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert copied == {f"recipes/{name}.yaml" for name in recipe_names()} | {
        f"deepspeed_configs/{name}" for name in launch_file_names()
    }


def test_copy_overwrites_only_when_told_to(tmp_path, capsys):
    target = ["--to", str(tmp_path)]
    run(capsys, "copy", "tiny/refl", *target)
    mine = tmp_path / "recipes/tiny/refl.yaml"
    mine.write_text("mine")
    assert app.main(["recipes", "copy", "tiny/ddpo", "tiny/refl", *target]) == 2
    assert "already there" in capsys.readouterr().err
    assert mine.read_text() == "mine" and not (tmp_path / "recipes/tiny/ddpo.yaml").exists()
    run(capsys, "copy", "tiny/refl", "--force", *target)
    assert mine.read_text() != "mine"


def test_check_reads_the_packaged_recipes_and_ones_own(tmp_path, capsys):
    assert run(capsys, "check").count(": ok, ") == len(recipe_names())
    (tmp_path / "a.yaml").write_text("method: refl\nseed: -1\noutput_dir: o\nrewards: [refreward]\n")
    (tmp_path / "b.yaml").write_text("sed: 1\noutput_dir: o\n")
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    assert app.main(["recipes", "check", *files]) == 2
    shown = capsys.readouterr().err
    assert "2 recipes have problems" in shown and "a.yaml:2: seed" in shown and "b.yaml: nothing says" in shown


def test_an_unknown_name_gets_the_nearest(capsys):
    assert app.main(["recipes", "show", "zero2.yml"]) == 2
    assert "did you mean 'zero2.yaml'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_opens_with_a_command_that_runs_it(name):
    recipe = read_recipe(name)
    comments = [line for line in find_recipe(name).read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    commands = [line.lstrip("# ") for line in comments if line.lstrip("# ").startswith("refreward ")]
    assert shlex.split(commands[0])[1:] == [*recipe.method.split(), "--config", f"recipes/{name}.yaml"]
    assert any(line.startswith("# Hardware: ") for line in comments)


@pytest.mark.parametrize("name", recipe_names())
def test_the_files_a_recipe_builds_on_are_made_by_another(name):
    made = {f"{read_recipe(other).values['output_dir']}/generator" for other in recipe_names()}
    made |= {f"{read_recipe(other).values['output_dir']}/judge" for other in recipe_names()}
    values = read_recipe(name).values
    source = values.get("generator", values.get("judge", "default"))
    if source in {"default", "new", "conv", *made} or "Instruct" in source:  # Instruct: named by its place on the hub
        return
    # What no recipe makes, the user brings: the comments say from where.
    needs = find_recipe(name).read_text(encoding="utf-8").partition("# Needs: ")[2].partition("\nmethod:")[0]
    assert source.partition(":")[0] in " ".join(needs.replace("my_network.py", "my_network").replace("# ", "").split())


@pytest.mark.parametrize("name", [name for name in launch_file_names() if name.endswith(".yaml")])
def test_a_launch_file_shows_its_command_and_is_read_by_accelerate(name):
    from accelerate.commands.config.config_args import ClusterConfig

    path = packaged_folder("deepspeed_configs") / name
    text = path.read_text(encoding="utf-8")
    assert re.search(
        rf"^# +.*accelerate launch --config_file deepspeed_configs/{re.escape(name)} .*-m refreward_trl", text, re.M
    )
    config = ClusterConfig.from_yaml_file(yaml_file=str(path))
    assert config.num_machines == 1
    # The name of a file would be looked for in the current folder, where an installed package has none.
    further = yaml.safe_load(text).get("deepspeed_config", {}).get("deepspeed_config_file", "{}")
    assert isinstance(json.loads(further), dict)

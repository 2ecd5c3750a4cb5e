"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from refreward_trl import LossOutput
from refreward_trl.cli import app
from refreward_trl.cli.building import build_rewards
from refreward_trl.cli.keys import METHODS, keys_of
from refreward_trl.cli.recipe import read_recipe
from refreward_trl.data.images import to_pil

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    assert found, f"README.md has no {language} block"
    return found


def block_with(language: str, word: str) -> str:
    (block,) = (block for block in blocks(language) if word in block)
    return block


def commands() -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [words for words in lines if words]


def examples() -> list[list[str]]:
    """The commands that need files which are not here."""
    lines = [line for block in blocks("console") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]


def with_config(words: list[str]) -> tuple[str, str, list[str]]:
    """The command, which may have two words, its recipe, and the flags after it."""
    place = words.index("--config")
    return " ".join(words[:place]), words[place + 1], words[place + 2 :]


def execute(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(block, names)
    return names


def test_every_python_block_is_one_of_those_run_here() -> None:
    assert len(blocks("python")) == 4


def test_a_network_of_ones_own_takes_few_lines() -> None:
    block = block_with("python", "my_network.py")
    compile(block, "my_network.py", "exec")
    assert len(block.splitlines()) + len(block_with("console", "my_network:build").splitlines()) < 30


def test_three_lines_score_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    hr_image = to_pil(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)))
    hr_image.save("sr.png")
    hr_image.resize((16, 16), Image.Resampling.BICUBIC).save("lr.png")
    execute(block_with("python", "from_pretrained"))
    assert 1 <= float(capsys.readouterr().out) <= 5


def test_the_reward_of_ones_own_serves_the_recipe_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(block_with("python", "def sharpness"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    entries = yaml.safe_load(block_with("yaml", "my_rewards"))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"method": "ddpo", "output_dir": "o", **entries}))
    rewards, names, weights = build_rewards(read_recipe(str(recipe)).values["rewards"])
    assert names == ["refreward", "sharpness"] and weights == [1.0, 0.2]
    flat, rough = torch.zeros(3, 8, 8), torch.eye(8).expand(3, 8, 8)
    scores = rewards[1](completions=[flat, rough], lr_image=None)
    assert scores[0] == 0 < scores[1]


def test_the_trainer_of_ones_own_halves_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = execute(block_with("python", "class MyTrainer"))["MyTrainer"]
    monkeypatch.setattr(trainer.__base__, "objective", lambda self, model, batch: LossOutput(torch.tensor(3.0), {}))
    assert trainer.objective(object.__new__(trainer), None, {}).loss == 1.5


@pytest.mark.parametrize("words", [words for words in commands() if "--config" in words], ids=" ".join)
def test_recipes_and_their_overrides_are_valid(words: list[str]) -> None:
    start = words.index("refreward_trl" if "refreward_trl" in words else "refreward")
    method, recipe, flags = with_config(words[start + 1 :])
    assert read_recipe(recipe, method=method, flags=flags).method == method
    if words[0] == "accelerate":
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()


@pytest.mark.parametrize(
    "words", [words for words in commands() if words[0] == "refreward" and "--config" not in words], ids=" ".join
)
def test_the_other_commands_run(words: list[str]) -> None:
    assert app.main(words[1:]) == 0


@pytest.mark.parametrize("words", examples(), ids=" ".join)
def test_examples_use_flags_and_recipes_that_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    start = words.index("refreward_trl" if "refreward_trl" in words else "refreward")
    method, *rest = words[start + 1 :]
    if "--config" in rest and with_config([method, *rest])[0] in METHODS:
        method, recipe, flags = with_config([method, *rest])
        flags = [word for word in flags if word != "--dry-run"]
        assert read_recipe(recipe, method=method, flags=flags).method == method
        return
    with pytest.raises(SystemExit, match="0"):
        app.main([method, "--help"])
    shown = capsys.readouterr().out
    keys = keys_of("refl") if "--key" in shown else {}
    assert all(word in shown or word[2:] in keys for word in rest if word.startswith("--"))


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {words[1] for words in commands() if words[0] == "make"}
    assert named and named <= targets


def test_every_file_it_names_exists() -> None:
    named = set(re.findall(r"`((?:recipes|deepspeed_configs|refreward_trl|benchmarks)/[\w./-]+)`", README))
    assert named and all((ROOT / name).exists() for name in named)

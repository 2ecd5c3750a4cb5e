from __future__ import annotations

import pytest

from refreward_trl.cli.packaged import recipe_names
from refreward_trl.cli.recipe import read_recipe
from refreward_trl.errors import ConfigError

GOOD = """output_dir: out
learning_rate: 1e-5
save_strategy: no
rewards:
- {name: lr_consistency, weight: 2}
- refreward
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe `r.yaml` into an empty current folder and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "r.yaml").write_text(text)
        return "r.yaml"

    return write


def refusal(source: str | None, method: str | None = "refl", flags: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        read_recipe(source, method=method, flags=flags)
    return str(caught.value)


def test_values_come_typed_and_without_defaults(recipe):
    read = read_recipe(recipe(GOOD), method="refl")
    assert read.values == {
        "output_dir": "out",
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "rewards": [{"name": "lr_consistency", "weight": 2}, "refreward"],
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("learning_rte: 1e-5", "r.yaml:7: unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ("seed: 1.5", "r.yaml:7: seed: expected a whole number >= 0, < 4294967296, got 1.5"),
        ("seed: '1'", 'r.yaml:7: seed: expected a whole number >= 0, < 4294967296, got "1"; write it without quotes'),
        ("max_grad_norm: fast", 'r.yaml:7: max_grad_norm: expected a number >= 0, got "fast"'),
        ("max_grad_norm: .nan", "r.yaml:7: max_grad_norm: expected a number >= 0, got NaN"),
        ("max_grad_norm: [1.0]", "r.yaml:7: max_grad_norm: expected a number >= 0, got [1.0]"),
        ("num_train_epochs: -4", "r.yaml:7: num_train_epochs: expected a number > 0, got -4"),
        ("num_train_epochs: 0", "r.yaml:7: num_train_epochs: expected a number > 0, got 0"),
        ("reward_cap: .inf", "r.yaml:7: reward_cap: expected a number or null, got Infinity"),
        ("adam_beta1: 1.0", "r.yaml:7: adam_beta1: expected a number >= 0, < 1, got 1.0"),
        ("bf16: yes", 'r.yaml:7: bf16: expected true or false, got "yes"; write true'),
        ("bf16: 1", "r.yaml:7: bf16: expected true or false, got 1"),
        ("seed: true", "r.yaml:7: seed: expected a whole number >= 0, < 4294967296, got true"),
        ("seed: 4294967296", "r.yaml:7: seed: expected a whole number >= 0, < 4294967296, got 4294967296"),
        ("max_steps: 9223372036854775808", "r.yaml:7: max_steps: expected a whole number >= -1, got 92233720368547"),
        ('run_name: "a\\0b"', 'r.yaml:7: run_name: expected text or null, got "a\\u0000b"'),
        ("seed: null", "r.yaml:7: seed: expected a whole number >= 0, < 4294967296, got null"),
        ("run_name: 12", "r.yaml:7: run_name: expected text or null, got 12; write it in quotes"),
        ("learning_rate: 1", "r.yaml:7: duplicate key 'learning_rate' (first on line 2)"),
        ("num_generations: 8", "r.yaml:7: unknown key 'num_generations'; `refreward refl` has no such setting"),
        ("debug: x", "r.yaml:7: unknown key 'debug'"),
    ],
)
def test_a_wrong_line_is_named_with_what_was_expected(recipe, line, expected):
    assert refusal(recipe(GOOD + line)).startswith(expected)


def test_a_wrong_choice_gets_the_nearest(recipe):
    message = refusal(recipe(GOOD + "lr_scheduler_type: cosin"))
    assert "expected one of linear, cosine" in message
    assert "got \"cosin\"; did you mean 'cosine'?" in message


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{name: refreward, wieght: 2}", "r.yaml:2: rewards[0]: unknown key 'wieght'; did you mean 'weight'?"),
        ("{weight: 2}", "r.yaml:2: rewards[0]: 'name' is missing"),
        ("{name: refreward, weight: a}", 'r.yaml:2: rewards[0].weight: expected a number, got "a"'),
        ("{name: refreward, kwargs: [1]}", "r.yaml:2: rewards[0].kwargs: expected a mapping, got [1]"),
        ("refrewrd", "r.yaml:2: rewards[0].name: there is no reward 'refrewrd'; did you mean 'refreward'?"),
        ("{name: a/b.py}", "r.yaml:2: rewards[0].name: there is no reward 'a/b.py'"),
        ("3", "r.yaml:1: rewards: expected a list of {name, weight, kwargs}, got [3]"),
    ],
)
def test_wrong_reward_entries_are_named(recipe, entry, expected):
    assert refusal(recipe(f"rewards:\n- {entry}\noutput_dir: out\n")).startswith(expected)


def test_a_users_reward_is_a_dotted_path(recipe):
    values = read_recipe(recipe("output_dir: o\nrewards: [{name: my_rewards.sharpness}]"), method="ddpo").values
    assert values["rewards"] == [{"name": "my_rewards.sharpness"}]


def test_all_problems_are_told_at_once(recipe):
    message = refusal(recipe("learning_rte: 1\nseed: -1\n"), flags=("--max_stps", "3", "--beta=x", "word"))
    for part in (
        "7 problems",
        "r.yaml:1: unknown key 'learning_rte'",
        "r.yaml:2: seed",
        "'max_stps'; did you mean 'max_steps'?",
        "unexpected word 'word'",
        "rewards: nothing is set",
        "output_dir: nothing is set",
    ):
        assert part in message
    assert len(message.splitlines()) == 9


def test_flags_override_the_recipe(recipe):
    flags = [
        "--learning_rate",
        "2e-4",
        "--save-strategy=steps",
        "--bf16",
        "--rewards",
        '[{"name": "ssim"}]',
        "--seed",
        "3",
    ]
    values = read_recipe(recipe(GOOD), method="refl", flags=flags).values
    assert values == {
        "output_dir": "out",
        "learning_rate": 2e-4,
        "save_strategy": "steps",
        "bf16": True,
        "rewards": [{"name": "ssim"}],
        "seed": 3,
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--learning_rate",), "--learning_rate needs a value"),
        (("--learning_rate", "fast"), 'learning_rate: expected a number >= 0, got "fast"'),
        (("--rewards", "[{"), "rewards: expected a list"),
        (("--rewards", '[{"name": "refrewrd"}]'), "did you mean 'refreward'?"),
        (("--rewards", '[{"name": "psnr", "name": "ssim"}]'), "as JSON it cannot be read: duplicate key 'name'"),
        (("--rewards", "[" * 90_000), "as JSON it cannot be read: nested too deeply"),
        (("--rewards", "[" * 30 + "]" * 30), "as JSON it cannot be read: nested too deeply"),
        (("--rewards", "[" + "9" * 5000 + "]"), "as JSON it cannot be read: Exceeds"),
        (("--max_steps", "-5"), "max_steps: expected a whole number >= -1, got -5"),
        (("--num_generations", "8"), "unknown flag 'num_generations'; `refreward refl` has no such setting"),
        (("-x",), "unexpected word '-x'"),
    ],
)
def test_flags_are_checked_like_the_recipe(recipe, flags, expected):
    message = refusal(recipe(GOOD), flags=flags)
    assert expected in message
    assert "command line" in message


def test_a_negative_number_is_a_value_and_no_flag(recipe):
    assert read_recipe(recipe(GOOD), method="refl", flags=["--max_steps", "-1"]).values["max_steps"] == -1


def test_null_turns_a_nullable_key_off(recipe):
    values = read_recipe(recipe(GOOD + "ema_decay: 0.99"), method="refl", flags=["--ema_decay", "null"]).values
    assert values["ema_decay"] is None


def test_a_recipe_runs_only_under_its_own_command(recipe):
    text = "method: ddpo\n" + GOOD
    assert read_recipe(recipe(text)).method == "ddpo"
    assert "r.yaml:1: this recipe is for `refreward ddpo`, not for `refreward refl`" in refusal(recipe(text))
    assert "method: expected one of" in refusal(recipe("method: dppo\n" + GOOD))
    assert "add `method:`" in refusal(recipe(GOOD), method=None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- a\n- b\n", "expected `key: value` lines"),
        (b"just words", "expected `key: value` lines"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b"a: [1", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path, monkeypatch, content, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_bytes(content)
    assert expected in refusal("r.yaml")


def test_a_recipe_is_found_as_a_file_first_and_then_in_the_package(recipe):
    assert "did you mean 'tiny/refl'?" in refusal("tiny/rfl")
    assert "a folder, not a recipe" in refusal(".")
    assert read_recipe("tiny/refl").values == read_recipe("recipes/tiny/refl.yaml").values
    (file := recipe(GOOD))
    assert read_recipe(file, method="refl").source == "r.yaml"


def test_every_packaged_recipe_is_clean():
    names = recipe_names()
    assert len(names) >= 6
    for name in names:
        assert read_recipe(name).values["output_dir"]

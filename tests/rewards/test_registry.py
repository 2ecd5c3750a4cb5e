"""Rewards by name and by dotted path, and what is said when a path leads nowhere."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys

import pytest
import torch

from refreward_trl.errors import ConfigError
from refreward_trl.rewards import REWARD_NAMES, RewardSpec, load_reward, reward_name, score_all
from refreward_trl.rewards.fidelity import psnr
from refreward_trl.types import RewardFunction

FIVE_LINES = """
def as_list(completions, **columns):
    return [1 - image.std().item() for image in completions]
def as_tensor(completions, **columns):
    return 1 - completions.std(dim=(1, 2, 3))
"""

MODULE = """
import math
number = 3
def scaled(*, completions, lr_image, factor=1.0, **columns):
    return [factor] * len(completions)
def without_columns(*, prompts, completions, lr_image):
    return []
def ddpo(images, prompts, metadata):
    return images, {}
class Sharpness:
    def __init__(self, power: int = 2):
        if power < 0:
            raise RuntimeError("power must not be negative")
        self.power = power
    def __call__(self, *, completions, **columns):
        return [float(self.power)] * len(completions)
class Mute:
    pass
ready = Sharpness(7)
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(FIVE_LINES)
    (tmp_path / "user_module.py").write_text(MODULE)
    (tmp_path / "broken_syntax.py").write_text("def f(:\n")
    (tmp_path / "broken_import.py").write_text("import no_such_library\n")
    (tmp_path / "broken_run.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    for name in ("my_rewards", "user_module", "broken_syntax", "broken_import", "broken_run"):
        sys.modules.pop(name, None)


def call(reward, count=2):
    return reward(prompts=[""] * count, completions=torch.zeros(count, 3, 8, 8), lr_image=torch.zeros(count, 3, 2, 2))


@pytest.mark.parametrize("name", REWARD_NAMES)
def test_our_own_names_load(name):
    kwargs = {"metric": "uqi"} if name == "metric" else {}
    reward = load_reward(RewardSpec(name, kwargs=kwargs))
    assert reward_name(reward) == kwargs.get("metric", name)
    assert isinstance(reward, RewardFunction)
    pickle.loads(pickle.dumps(reward))


def test_our_own_rewards_take_kwargs():
    assert load_reward({"name": "lr_consistency", "kwargs": {"cap": 40}}).cap == 40
    assert (
        load_reward({"name": "refreward", "kwargs": {"source": "runs/judge", "batch_size": 4}}).source == "runs/judge"
    )


def test_a_five_line_file_gives_a_list_reward_and_a_tensor_reward():
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    rewards = [load_reward("my_rewards.as_list"), load_reward("my_rewards.as_tensor")]
    table = score_all(rewards, None, [1.0, 1.0], completions=images, lr_image=torch.zeros(4, 3, 2, 2), group_size=2)
    assert list(table.per_reward) == ["as_list", "as_tensor"]
    assert not table.per_reward["as_list"].requires_grad
    assert table.per_reward["as_tensor"].requires_grad
    torch.testing.assert_close(table.per_reward["as_list"], table.per_reward["as_tensor"].detach())
    table.total.sum().backward()
    assert images.grad.abs().sum() > 0


def test_classes_are_instantiated_functions_are_partial_and_objects_are_used_as_they_are():
    import_order = [
        (RewardSpec("user_module.Sharpness"), 2.0),
        (RewardSpec("user_module.Sharpness", kwargs={"power": 5}), 5.0),
        (RewardSpec("user_module.ready"), 7.0),
        (RewardSpec("user_module.scaled"), 1.0),
        (RewardSpec("user_module.scaled", kwargs={"factor": 4.0}), 4.0),
    ]
    for spec, value in import_order:
        assert call(load_reward(spec)) == [value, value]
    partial = load_reward(import_order[-1][0])
    assert isinstance(partial, functools.partial)
    assert reward_name(partial) == "scaled"


def test_a_path_through_the_package_works():
    assert load_reward("refreward_trl.rewards.psnr") is psnr


ERRORS = {
    "typo in our name": ("refrewrad", {}, "did you mean 'refreward'"),
    "nothing like it": ("zzz", {}, "the rewards are refreward, heldout_judge"),
    "colon": ("user_module:scaled", {}, "no such reward"),
    "no module": ("my_rewrads.as_list", {}, "there is no module 'my_rewrads' in"),
    "no submodule": ("user_module.inner.scaled", {}, "no module 'user_module.inner'"),
    "typo in attribute": ("user_module.scalde", {}, "did you mean user_module.scaled"),
    "not callable": ("user_module.number", {}, "int, which cannot be called"),
    "missing library": ("broken_import.f", {}, "imports 'no_such_library', which is not installed"),
    "syntax error": ("broken_syntax.f", {}, "raised SyntaxError"),
    "error at import": ("broken_run.f", {}, "raised ZeroDivisionError"),
    "unknown class argument": ("user_module.Sharpness", {"powr": 1}, "'powr'"),
    "constructor raises": ("user_module.Sharpness", {"power": -1}, "RuntimeError: power must not be negative"),
    "instances not callable": ("user_module.Mute", {}, "give it a __call__"),
    "no **columns": ("user_module.without_columns", {}, "cannot be called as a reward"),
    "DDPO signature": ("user_module.ddpo", {}, "from_ddpo"),
    "unknown function argument": ("user_module.without_columns", {"x": 1}, "cannot be called"),
    "our class refuses": ("lr_consistency", {"cap": -1}, "cap must be"),
    "our class, unknown argument": ("refreward", {"sorce": "x"}, "'sorce'"),
    "builtin": ("math.sqrt", {}, "cannot be called as a reward"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_reward_that_cannot_be_loaded_is_explained(case):
    name, kwargs, message = ERRORS[case]
    with pytest.raises(ConfigError) as caught:
        load_reward(RewardSpec(name, kwargs=kwargs))
    assert message in str(caught.value)
    assert f"reward '{name}'" in str(caught.value)


def test_a_file_of_the_users_does_not_shadow_an_installed_package(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('shadowed')\n")
    with pytest.raises(ConfigError, match="has no 'reward'"):
        load_reward("colorsys.reward")


def test_importing_the_package_imports_no_torch():
    code = "import sys, refreward_trl.rewards as r; r.REWARD_NAMES; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_an_unknown_attribute_is_an_attribute_error():
    import refreward_trl.rewards

    with pytest.raises(AttributeError, match="nothing_here"):
        _ = refreward_trl.rewards.nothing_here

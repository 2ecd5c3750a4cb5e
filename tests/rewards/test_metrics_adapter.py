"""Metrics as rewards: their range, their sign, their graph, and what they need."""

from __future__ import annotations

import pickle
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refreward_trl.errors import ConfigError, DataError, RewardError, SetupError
from refreward_trl.resampling import downscale
from refreward_trl.rewards import from_metric, load_reward, psnr, score_all
from refreward_trl.rewards.metrics_adapter import MetricReward, NamedMetric

SR = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
HR = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))
LR = downscale(HR, 4).clamp(0, 1)
FULL: dict[str, Any] = {"higher_is_better": True, "value_range": (0, 1), "needs": "hr"}


class Distance(nn.Module):
    """A user's network: it has weights, and compares two images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return self.weight * (image - target).abs().mean(dim=(1, 2, 3))[:, None]


def mean_of_batch(image: Tensor) -> Tensor:
    return image.mean()


def score(reward: Any, completions: Any = SR, **columns: Any) -> Tensor:
    columns = {"hr_image": HR} | columns
    return score_all([reward], ["x"], None, completions=completions, lr_image=LR, columns=columns).per_reward["x"]


def test_functions_of_torchmetrics_are_rewards() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    ours = from_metric(_psnr_255, higher_is_better=True, value_range=(0, 255), needs="hr")
    torch.testing.assert_close(score(ours), score(psnr), atol=1e-3, rtol=0)
    similarity = partial(functional.structural_similarity_index_measure, data_range=1.0)
    reward = from_metric(similarity, **FULL)
    assert reward.__name__ == "structural_similarity_index_measure"
    expected = [similarity(image[None], target[None]) for image, target in zip(SR, HR, strict=True)]
    torch.testing.assert_close(score(reward), torch.stack(expected))


def _psnr_255(image: Tensor, target: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(image, target, data_range=255.0)


@pytest.mark.parametrize("value_range", [(0, 1), (0, 255), (-1, 1)])
def test_the_metric_gets_the_range_that_it_expects(value_range: tuple[float, float]) -> None:
    seen: list[Tensor] = []

    def watch(image: Tensor) -> float:
        seen.append(image)
        return 1.0

    ends = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    from_metric(watch, higher_is_better=True, value_range=value_range, needs="none")(completions=ends)
    assert [image.unique().tolist() for image in seen] == [[value_range[0]], [value_range[1]]]


def test_the_sign_is_turned_where_lower_is_better() -> None:
    distance = from_metric(Distance(), higher_is_better=False, value_range=(0, 1), needs="hr")
    torch.testing.assert_close(score(distance), -2 * (SR - HR).abs().mean(dim=(1, 2, 3)))
    assert distance.__name__ == "Distance"


def test_lr_is_compared_at_its_own_size() -> None:
    reward = from_metric(Distance(), higher_is_better=False, value_range=(0, 1), needs="lr")
    expected = -2 * (downscale(SR, 4) - LR).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(score(reward), expected)
    with pytest.raises(DataError, match="no whole multiple"):
        reward(completions=SR[..., :15], lr_image=LR)


@pytest.mark.parametrize("needs", ["hr", "lr"])
def test_a_graph_reaches_the_pixels(needs: Any) -> None:
    completions = SR.clone().requires_grad_()
    reward = from_metric(Distance(), higher_is_better=False, value_range=(-1, 1), needs=needs)
    total = score(reward, completions)
    total.sum().backward()
    assert completions.grad is not None and completions.grad.abs().sum(dim=(1, 2, 3)).min() > 0
    with torch.no_grad():
        assert not score(reward, completions).requires_grad


def test_a_torchmetrics_formula_is_differentiable() -> None:
    pytest.importorskip("torchmetrics")
    completions = SR.clone().requires_grad_()
    score(load_reward({"name": "metric", "kwargs": {"metric": "uqi"}}), completions).sum().backward()
    assert completions.grad is not None and completions.grad.abs().sum() > 0


def test_a_torchmetrics_module_gathers_nothing() -> None:
    image = pytest.importorskip("torchmetrics.image")
    module = image.PeakSignalNoiseRatio(data_range=1.0)
    reward = from_metric(module, **FULL)
    first = score(reward)
    assert module.update_count == 0 and not module.sum_squared_error
    torch.testing.assert_close(score(reward), first)
    torch.testing.assert_close(first, score(psnr), atol=1e-3, rtol=0)


def test_batches_change_nothing_and_one_number_for_many_images_is_refused() -> None:
    one, many = (
        from_metric(Distance(), higher_is_better=False, value_range=(0, 1), needs="hr", batch_size=size)
        for size in (1, 8)
    )
    torch.testing.assert_close(score(one), score(many))
    averaging: dict[str, Any] = {"higher_is_better": True, "value_range": (0, 1), "needs": "none"}
    torch.testing.assert_close(score(from_metric(mean_of_batch, **averaging)), SR.mean(dim=(1, 2, 3)))
    with pytest.raises(RewardError, match="for 3 images") as caught:
        score(from_metric(mean_of_batch, **averaging, batch_size=8))
    assert "batch_size to 1" in str(caught.value)
    with pytest.raises(RewardError, match="returned dict for 1 image"):
        score(from_metric(lambda image: {"score": image.mean()}, **averaging))


def test_missing_images_are_not_scored_and_a_missing_column_is_told() -> None:
    reward = from_metric(Distance(), **FULL)
    assert score(reward, hr_image=[HR[0], None, HR[2]]).isnan().tolist() == [False, True, False]
    assert reward(completions=[SR[0], None], lr_image=LR[:2], hr_image=HR[:2])[1] is None
    with pytest.raises(DataError, match="'hr_image' is missing"):
        reward(completions=SR, lr_image=LR)
    with pytest.raises(DataError, match="its HR image"):
        reward(completions=SR, lr_image=LR, hr_image=HR[..., :8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_range": (1, 0)}, "value_range"),
        ({"value_range": (0, float("inf"))}, "value_range"),
        ({"needs": "gt"}, "needs must be one of none, lr, hr"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_impossible_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MetricReward(Distance(), **FULL | changes)


def test_rewards_of_metrics_pickle() -> None:
    for reward in (from_metric(Distance(), **FULL), NamedMetric("uqi"), NamedMetric("pyiqa:musiq")):
        copy = pickle.loads(pickle.dumps(reward))
        assert copy.__name__ == reward.__name__
    pytest.importorskip("torchmetrics")
    used = NamedMetric("uqi")
    first = score(used)
    torch.testing.assert_close(score(pickle.loads(pickle.dumps(used))), first)


@pytest.fixture
def pyiqa(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package that answers like pyiqa 0.1.16; returns the options of each network that was made."""
    made: list[dict[str, Any]] = []

    class Network(nn.Module):
        def __init__(self, name: str, as_loss: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.metric_mode = "FR" if name == "lpips" else "NR"
            self.lower_better = name == "lpips"
            self.as_loss = as_loss

        def forward(self, image: Tensor, target: Tensor | None = None) -> Tensor:
            with torch.set_grad_enabled(self.as_loss):
                difference = image if target is None else (image - target).abs()
                return self.weight * difference.mean(dim=(1, 2, 3))[:, None]

    def create_metric(name: str, as_loss: bool = False, device: Any = None, **options: Any) -> Network:
        made.append({"name": name, "as_loss": as_loss, **options})
        return Network(name, as_loss)

    module: Any = ModuleType("pyiqa")
    module.create_metric, module.list_models = create_metric, lambda: ["lpips", "musiq"]
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    return made


@pytest.mark.parametrize(("name", "expected"), [("musiq", SR), ("lpips", -(SR - HR).abs())])
def test_metrics_of_pyiqa_are_rewards_by_name(name: str, expected: Tensor, pyiqa: list[dict[str, Any]]) -> None:
    reward = load_reward({"name": "metric", "kwargs": {"metric": f"pyiqa:{name}", "batch_size": 2}})
    assert not pyiqa, "nothing is loaded before the first score"
    completions = SR.clone().requires_grad_()
    values = score(reward, completions)
    torch.testing.assert_close(values, expected.mean(dim=(1, 2, 3)))
    values.sum().backward()
    assert completions.grad is not None and completions.grad.abs().sum() > 0
    assert pyiqa == [{"name": name, "as_loss": True, "loss_reduction": "none"}]
    assert reward.__name__ == f"pyiqa_{name}"  # pyright: ignore[reportAttributeAccessIssue]


def test_an_unknown_metric_is_told(pyiqa: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="no metric 'musiq'") as caught:
        load_reward({"name": "metric", "kwargs": {"metric": "musiq"}})
    assert "pyiqa:ID" in str(caught.value)
    with pytest.raises(ConfigError, match="no metric 'musik'"):
        score(NamedMetric("pyiqa:musik"))


def test_a_missing_package_is_told_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr("refreward_trl.rewards.foreign.importlib.import_module", missing)
    with pytest.raises(SetupError, match="pyiqa is not installed"):
        score(NamedMetric("pyiqa:musiq"))

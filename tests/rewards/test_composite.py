"""Rewards called, checked and combined: the contract's refusals, missing values, and TRL's two aggregations."""

from __future__ import annotations

import functools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from refreward_trl.errors import ConfigError, DataError, RewardError
from refreward_trl.rewards.composite import RewardSpec, nan_std, reward_name, reward_names, score_all

NAN = math.nan


def returns(value, name="odd"):
    """A reward that returns `value`."""

    def reward(*, prompts, completions, lr_image, **columns):
        return value

    reward.__name__ = name
    return reward


def score(*rewards, weights=None, group_size=1, aggregation="sum_then_normalize", count=4, **keywords):
    return score_all(
        rewards,
        None,
        weights,
        completions=torch.zeros(count, 3, 8, 8),
        lr_image=torch.zeros(count, 3, 2, 2),
        group_size=group_size,
        aggregation=aggregation,
        **keywords,
    )


BAD_RETURNS = {
    "nothing": (None, "return"),
    "one float": (0.5, "float 0.5"),
    "a string": ("1234", "str '1234'"),
    "strings": (["1", "2", "3", "4"], "str '1' for sample 'a'"),
    "too few": ([1.0, 2.0], "returned 2 rewards, but 4 were expected"),
    "too many": ([1.0] * 5, "returned 5 rewards, but 4 were expected"),
    "too few in a tensor": (torch.ones(3), "returned 3 rewards, but 4 were expected"),
    "complex numbers": ([1.0, 2.0, 3.0, 1j], "complex 1j for sample 'd'"),
    "a complex tensor": (torch.ones(4, dtype=torch.complex64), "complex64"),
    "nested lists": ([[1.0], [2.0], [3.0], [4.0]], r"list \[1.0\]"),
    "a column tensor": (torch.ones(4, 1), r"shape \(4, 1\), expected \(4,\)"),
    "a scalar tensor": (torch.tensor(1.0), r"shape \(\), expected \(4,\)"),
    "booleans": ([True, False, True, True], "bool True"),
    "a boolean tensor": (torch.ones(4, dtype=torch.bool), "torch.bool"),
    "a boolean array": (np.ones(4, dtype=bool), "array of bool"),
    "an array of objects": (np.array([None] * 4), "array of object"),
    "vectors in a list": ([torch.ones(2)] * 4, "Tensor"),
    "a mapping": ({"a": 1.0}, "dict"),
    "a generator": ((x for x in [1.0] * 4), "generator"),
    "a pair as of DDPO": (([1.0] * 4, {}), "returned 2 rewards"),
    "infinity": ([1.0, math.inf, -math.inf, 2.0], r"sample 'b' \(inf\), sample 'c' \(-inf\)"),
    "infinity in a tensor": (torch.tensor([1.0, 2.0, 3.0, math.inf]), "sample 'd'"),
    "beyond float32": ([1e300, 0.0, 0.0, 0.0], "infinite value for sample 'a'"),
    "beyond floats": ([10**400, 0.0, 0.0, 0.0], "infinite value for sample 'a'"),
}


@pytest.mark.parametrize("case", BAD_RETURNS)
def test_what_is_no_reward_is_refused_by_name(case):
    value, message = BAD_RETURNS[case]
    with pytest.raises(RewardError, match=message) as caught:
        score(returns([0.0] * 4, "good"), returns(value), columns={"sample_id": ["a", "b", "c", "d"]})
    assert "reward 'odd'" in str(caught.value)
    assert caught.value.exit_code == 4


def test_many_infinite_values_are_summarised():
    with pytest.raises(RewardError, match=r"row 4 \(inf\) and 3 more"):
        score(returns([math.inf] * 8), count=8)


@pytest.mark.parametrize(
    "value",
    [
        [0, 1, None, NAN],
        (0.0, 1.0, None, None),
        [np.float32(0), np.float64(1), np.int64(0) * NAN, None],
        [torch.tensor(0.0), torch.tensor(1, dtype=torch.int64), None, NAN],
        [Fraction(0), Fraction(1), None, None],
        np.array([0.0, 1.0, NAN, NAN]),
        torch.tensor([0.0, 1.0, NAN, NAN], dtype=torch.bfloat16),
        torch.tensor([0.0, 1.0, NAN, NAN], dtype=torch.float64),
    ],
)
def test_every_way_of_returning_numbers_is_read(value):
    table = score(returns(value))
    assert table.per_reward["odd"].dtype == torch.float32
    torch.testing.assert_close(table.per_reward["odd"], torch.tensor([0.0, 1.0, NAN, NAN]), equal_nan=True)
    torch.testing.assert_close(table.total, torch.tensor([0.0, 1.0, NAN, NAN]), equal_nan=True)
    assert table.missing == {"odd": 2}


def test_integers_in_arrays_and_tensors_are_numbers():
    assert score(returns(np.arange(4))).total.tolist() == [0, 1, 2, 3]
    assert score(returns(torch.arange(4))).total.tolist() == [0, 1, 2, 3]


def test_missing_rewards_are_left_out_of_the_sum_and_never_become_zero():
    table = score(returns([1.0, None, 3.0, None], "a"), returns([10.0, 20.0, NAN, NAN], "b"), weights=[2.0, 0.5])
    torch.testing.assert_close(table.total, torch.tensor([7.0, 10.0, 6.0, NAN]), equal_nan=True)
    assert table.missing == {"a": 2, "b": 2}
    metrics = table.metrics()
    assert metrics["rewards/a/mean"] == 2
    assert metrics["rewards/a/missing"] == 2
    assert metrics["reward"] == pytest.approx(23 / 3)
    assert metrics["reward_std"] == pytest.approx(np.std([7, 10, 6], ddof=1))


def test_a_row_that_only_a_reward_of_weight_0_scored_is_not_scored():
    table = score(returns([1.0, None, 3.0, 4.0], "used"), returns([5.0] * 4, "watched"), weights=[1.0, 0.0])
    torch.testing.assert_close(table.total, torch.tensor([1.0, NAN, 3.0, 4.0]), equal_nan=True)
    assert score(returns([5.0] * 4), weights=[0.0]).total.tolist() == [0.0] * 4


def test_normalize_then_sum_by_hand():
    sharp = [1.0, 3.0, 100.0, 300.0]
    plain = [5.0, 4.0, 5.0, 5.0]
    table = score(
        returns(sharp, "sharp"),
        returns(plain, "plain"),
        weights=[1.0, 2.0],
        group_size=2,
        aggregation="normalize_then_sum",
    )
    unit = 1 / math.sqrt(2)  # deviation over standard deviation of any two different numbers
    expected = [
        -1 / (math.sqrt(2) + 1e-4) + 2 * 0.5 / (unit + 1e-4),
        1 / (math.sqrt(2) + 1e-4) - 2 * 0.5 / (unit + 1e-4),
        -100 / (100 * math.sqrt(2) + 1e-4) + 0.0,  # the flat group of `plain` says nothing
        100 / (100 * math.sqrt(2) + 1e-4) + 0.0,
    ]
    assert table.total.tolist() == pytest.approx(expected, rel=1e-5)
    assert table.weighted_sum.tolist() == [11.0, 11.0, 110.0, 310.0]
    assert table.group_std["sharp"].tolist() == pytest.approx([math.sqrt(2), 100 * math.sqrt(2)])
    assert table.group_std["plain"].tolist() == pytest.approx([unit, 0.0])


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_total_agrees_with_the_formula_of_trl(aggregation):
    """TRL's documented definition, written out independently in float64, on rewards with gaps."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(24, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1])
    raw[torch.rand(24, 3, generator=generator) < 0.3] = NAN
    raw[0] = NAN
    raw[4:8, 1] = torch.tensor([NAN, NAN, 2.0, NAN])  # a lone scored candidate
    weights = [1.0, 0.3, -2.0]
    table = score(
        *[returns(raw[:, i], f"r{i}") for i in range(3)],
        weights=weights,
        group_size=4,
        aggregation=aggregation,
        count=24,
    )
    expected = []
    for row in range(24):
        group = raw[row // 4 * 4 : row // 4 * 4 + 4].double().numpy()
        terms = []
        for i in range(3):
            scored = group[:, i][~np.isnan(group[:, i])]
            value = raw[row, i].item()
            if math.isnan(value):
                continue
            if aggregation == "normalize_then_sum":
                value = (value - scored.mean()) / (scored.std(ddof=1) + 1e-4) if len(scored) > 1 else 0.0
            terms.append(weights[i] * value)
        expected.append(sum(terms) if terms else NAN)
    assert table.total.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)


def test_normalize_then_sum_ignores_the_scale_and_offset_of_a_reward():
    values = torch.tensor([0.3, 0.1, 0.9, 0.4, 0.2, 0.8])
    other = torch.tensor([5.0, 1.0, 2.0, 3.0, 3.0, 9.0])
    keywords = {"group_size": 3, "aggregation": "normalize_then_sum", "count": 6}
    first = score(returns(values, "a"), returns(other, "b"), **keywords).total
    second = score(returns(100 * values - 7, "a"), returns(other, "b"), **keywords).total
    torch.testing.assert_close(first, second, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_the_graph_of_tensors_is_kept_and_stays_finite_beside_gaps(aggregation):
    image = torch.rand(6, requires_grad=True)
    value = torch.where(torch.tensor([False, True, False, False, True, True]), NAN, 2 * image)
    table = score(
        returns(value, "graph"),
        returns([1.0] * 6, "list"),
        weights=[3.0, 1.0],
        group_size=3,
        aggregation=aggregation,
        count=6,
    )
    assert table.total.requires_grad and table.per_reward["graph"].requires_grad
    assert not table.per_reward["list"].requires_grad and not table.weighted_sum.requires_grad
    (gradient,) = torch.autograd.grad(table.total.sum(), image)
    assert gradient.isfinite().all()
    assert (gradient != 0).tolist()[:3] == [True, False, True]
    if aggregation == "sum_then_normalize":
        assert gradient.tolist() == [6, 0, 6, 6, 0, 0]
    else:
        assert gradient[3] == 0  # alone in its group


def test_a_list_of_scalar_tensors_keeps_the_graph():
    image = torch.rand(4, requires_grad=True)
    assert score(returns(list(image))).total.requires_grad


def test_an_exception_names_its_reward_and_keeps_its_cause():
    def fragile(**columns):
        return [1 / 0]

    with pytest.raises(RewardError, match="reward 'fragile': raised ZeroDivisionError") as caught:
        score(fragile)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_packages_own_errors_pass_unchanged():
    def picky(**columns):
        raise DataError("the column 'hr_image' is missing", where="reward 'picky'")

    with pytest.raises(DataError, match="hr_image") as caught:
        score(picky)
    assert caught.value.exit_code == 3


def test_a_reward_gets_what_trl_would_pass():
    seen = {}
    logged = []

    def reward(*, prompts, completions, completion_ids, lr_image, trainer_state, log_metric, log_extra, **columns):
        seen.update(columns, prompts=prompts, completion_ids=completion_ids, state=trainer_state)
        log_metric("brightness", 0.5)
        log_extra("note", ["x"] * len(completions))
        return [0.0] * len(completions)

    score(reward)  # without loggers both are still callable
    score(
        reward,
        columns={"prompt": ["p"] * 4, "sample_id": ["a", "b", "c", "d"], "hr_image": [None] * 4},
        trainer_state="state",
        log_metric=lambda name, value: logged.append((name, value)),
        log_extra=lambda column, values: logged.append((column, values)),
    )
    assert seen == {
        "prompts": ["p"] * 4,
        "completion_ids": None,
        "state": "state",
        "sample_id": ["a", "b", "c", "d"],
        "hr_image": [None] * 4,
    }
    assert logged == [("brightness", 0.5), ("note", ["x"] * 4)]


def test_lists_of_images_of_different_sizes_are_passed_as_they_are():
    images = [torch.zeros(3, 8, 8), torch.zeros(3, 8, 16)]

    def width(*, completions, **columns):
        assert completions is images
        return [image.shape[-1] for image in completions]

    table = score_all([width], None, None, completions=images, lr_image=[None, None])
    assert table.total.tolist() == [8, 16]


BAD_PLANS = {
    "no reward": ({"reward_funcs": []}, "no reward"),
    "weights of another number": ({"weights": [1.0, 2.0]}, "1 rewards came with 1 names and 2 weights"),
    "names of another number": ({"names": []}, "0 names"),
    "equal names": ({"reward_funcs": [returns([0.0] * 4)] * 2, "names": ["a", "a"]}, "share a name"),
    "a weight that is not finite": ({"weights": [NAN]}, "finite"),
    "groups that do not fit": ({"group_size": 3}, "groups of 3"),
    "no completions": ({"completions": torch.zeros(0, 3, 8, 8)}, "0 completions"),
    "an unknown aggregation": ({"aggregation": "normalise_then_sum"}, "use 'normalize_then_sum'"),
    "normalising single candidates": ({"aggregation": "normalize_then_sum"}, "only one"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_plans_that_cannot_work_are_refused(case):
    changed, message = BAD_PLANS[case]
    arguments = {
        "reward_funcs": [returns([0.0] * 4)],
        "names": None,
        "weights": None,
        "completions": torch.zeros(4, 3, 8, 8),
        "lr_image": torch.zeros(4, 3, 2, 2),
    }
    with pytest.raises(ConfigError, match=message):
        score_all(**arguments | changed)


def test_a_column_of_another_length_is_refused_by_name():
    with pytest.raises(DataError, match="column 'hr_image': 3 entries for 4 completions"):
        score(returns([0.0] * 4), columns={"hr_image": torch.zeros(3, 3, 8, 8)})


def test_names_follow_trl():
    from trl.trainer.utils import get_callable_name

    class Plain:
        def __call__(self, **columns): ...

    class Named(Plain):
        __name__ = "named"

    def function(**columns): ...

    rewards = [function, Plain(), Named(), functools.partial(functools.partial(function, a=1), b=2)]
    assert [reward_name(reward) for reward in rewards] == ["function", "Plain", "named", "function"]
    assert [reward_name(reward) for reward in rewards] == [get_callable_name(reward) for reward in rewards]
    assert reward_names(rewards) == ["function", "Plain", "named", "function_2"]


def test_nan_std_is_trls():
    from trl.trainer.utils import nanstd

    values = torch.tensor([[1.0, 2.0, NAN, 4.0], [1.0, NAN, NAN, NAN], [NAN] * 4, [3.0] * 4])
    torch.testing.assert_close(nan_std(values), nanstd(values, dim=1), equal_nan=True)


def test_metric_keys_do_not_depend_on_the_values():
    full = score(returns([1.0, 2.0, 3.0, 4.0])).metrics()
    empty = score(returns([None] * 4)).metrics()
    assert list(full) == list(empty)
    assert math.isnan(empty["reward"]) and empty["rewards/odd/missing"] == 4


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("psnr", RewardSpec("psnr")),
        ({"name": "psnr"}, RewardSpec("psnr", 1.0, {})),
        ({"name": "my.reward", "weight": -2, "kwargs": {"a": 1}}, RewardSpec("my.reward", -2, {"a": 1})),
        (RewardSpec("ssim"), RewardSpec("ssim")),
    ],
)
def test_recipe_entries_are_read(entry, expected):
    assert RewardSpec.from_entry(entry) == expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "psnr", "wieght": 2}, "use 'weight'"),
        ({"weight": 2}, "no name"),
        (3, "name or a mapping"),
        ("", "non-empty"),
        ({"name": 3}, "non-empty string"),
        ({"name": "psnr", "weight": "2"}, "finite number"),
        ({"name": "psnr", "weight": True}, "finite number"),
        ({"name": "psnr", "weight": NAN}, "finite number"),
        ({"name": "psnr", "kwargs": [1]}, "mapping"),
        ({"name": "psnr", "kwargs": {1: 2}}, "string keys"),
    ],
)
def test_bad_recipe_entries_are_refused(entry, message):
    with pytest.raises(ConfigError, match=message):
        RewardSpec.from_entry(entry)


# Failures that a run puts up with


@pytest.mark.parametrize("case", BAD_RETURNS)
def test_dropped_candidates_have_no_total_and_are_counted(case):
    value, _ = BAD_RETURNS[case]
    fine = returns([1.0, 2.0, 3.0, 4.0], "fine")
    table = score(fine, returns(value), on_bad="drop")
    assert table.failed == {"fine": 0, "odd": 4}
    assert table.total.isnan().all()
    assert table.weighted_sum.isnan().all()
    assert table.per_reward["fine"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert table.metrics()["rewards/odd/failed"] == 4.0


def test_a_failed_reward_of_weight_0_takes_nothing_away():
    table = score(returns([1.0] * 4, "fine"), returns(None), weights=[1.0, 0.0], on_bad="drop")
    assert table.total.tolist() == [1.0] * 4
    assert table.failed["odd"] == 4


def test_missing_is_not_failed():
    table = score(returns([1.0, None, NAN, 4.0], "gaps"), on_bad="drop")
    assert (table.missing["gaps"], table.failed["gaps"]) == (2, 0)


def test_a_reward_that_raises_or_hangs_is_dropped_too():
    def raising(**columns):
        raise ValueError("no")

    def hanging(**columns):
        time.sleep(30)
        return [1.0] * 4

    table = score(raising, hanging, on_bad="drop", timeout=0.1)
    assert table.failed == {"raising": 4, "hanging": 4}


def test_our_own_errors_are_never_dropped():
    def unreadable(**columns):
        raise DataError("no lr_image")

    with pytest.raises(DataError):
        score(unreadable, on_bad="drop")

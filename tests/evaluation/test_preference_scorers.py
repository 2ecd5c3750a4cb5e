"""What scorers are asked and what becomes of their answers; and how judges are named and opened."""

from __future__ import annotations

import sys
from dataclasses import replace
from math import isnan, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_sets import group
from tiny_judges import family_judge, family_spec
from torch import Tensor

from refreward_trl.data.image_sources import ImageTensor
from refreward_trl.data.preferences import OrderedPair, PreferenceGroup
from refreward_trl.errors import CheckpointError, ConfigError, RewardError
from refreward_trl.evaluation.metrics import Metric, Sample, load_metric
from refreward_trl.evaluation.preference_judges import JudgeOptions, JudgeWord, check_judge, open_judge, read_judges
from refreward_trl.evaluation.preference_scorers import CompareScorer, MetricScorer, RewardScorer
from refreward_trl.evaluation.protocols import HR, Protocol
from refreward_trl.reward_model.comparing import CompareJudge
from refreward_trl.reward_model.conv import ConvJudge
from refreward_trl.reward_model.reasoning import ReasonCompareJudge

PAIRS = [OrderedPair(0, 1, 1.0, False), OrderedPair(0, 2, 1.0, False)]


def loaded(count: int = 4, **fields: Any) -> PreferenceGroup:
    return group(1, range(count), generators=["secret"] * count, kinds=["secret"] * count, **fields).load()


# Rewards


def test_a_reward_sees_images_and_never_who_made_them() -> None:
    seen: list[dict[str, Any]] = []

    def watch(**columns: Any) -> list[float | None]:
        seen.append(columns)
        return [1.0, None, 3.0]

    reply = RewardScorer("mine", watch, {}).reply(loaded(), PAIRS)
    assert isnan(reply.margins[0]) and reply.margins[1] == -2.0
    assert reply.scores[0] == 1.0 and set(reply.scores) == {0, 1, 2} and not reply.agrees
    (columns,) = seen
    assert len(columns["completions"]) == len(columns["lr_image"]) == len(columns["hr_image"]) == 3
    assert "secret" not in str({key: value for key, value in columns.items() if not callable(value)})


def test_a_reward_that_raises_is_not_passed_over() -> None:
    def broken(**columns: Any) -> list[float]:
        raise ZeroDivisionError

    with pytest.raises(RewardError, match="'mine'"):
        RewardScorer("mine", broken, {}).reply(loaded(), PAIRS)


# Judges that compare


class Fixed(CompareJudge):
    """A judge that prefers the brighter candidate, and by `habit` the one that is shown first."""

    def __init__(self, habit: float) -> None:
        self.habit = habit
        self.calls = 0

    def compare_orders(self, lr_image: Tensor, first: Tensor, second: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        odds = 10 * (first.mean(dim=(1, 2, 3)) - second.mean(dim=(1, 2, 3)))
        return odds + self.habit, -odds + self.habit


@pytest.mark.parametrize(("habit", "agrees"), [(0.0, 1.0), (0.1, 1.0), (50.0, 0.0), (nan, None)])
def test_the_order_of_two_candidates_is_tried_both_ways(habit: float, agrees: float | None) -> None:
    scorer = CompareScorer("mine", Fixed(habit), {})
    if agrees is None:
        with pytest.raises(RewardError, match="not finite"):
            scorer.reply(loaded(), PAIRS)
        return
    reply = scorer.reply(loaded(), PAIRS)
    assert reply.agrees == [agrees] * 2 and not reply.scores
    assert reply.margins == pytest.approx([10 * 15 / 255, 10 * 30 / 255], abs=0.1)


class Reasoning(ReasonCompareJudge):
    """A judge that chooses the brighter candidate, and has no answer where one above a limit is shown first."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def compare_orders(self, lr_image: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        brightness = [side.mean(dim=(1, 2, 3)) for side in (first, second)]
        odds = (brightness[0] - brightness[1]).sign()
        return odds.masked_fill(brightness[0] > self.limit, nan), -odds


def test_a_judge_that_names_no_choice_gives_no_answer() -> None:
    given = loaded()
    brightest, second = (float(given.candidates[index].float().mean()) / 255 for index in (0, 1))
    scorer = CompareScorer("mine", Reasoning((brightest + second) / 2), {})
    reply = scorer.reply(given, [PAIRS[0], OrderedPair(1, 2, 1.0, False)])
    assert isnan(reply.margins[0]) and isnan(reply.agrees[0])
    assert (reply.margins[1], reply.agrees[1]) == (1.0, 1.0)
    assert scorer.problem == "an answer names no choice"


def test_candidates_of_unlike_sizes_get_no_answer() -> None:
    record = group(1, range(4))
    large = replace(record.candidates[1], image=ImageTensor(torch.zeros(3, 32, 32, dtype=torch.uint8)))
    record = replace(record, candidates=(record.candidates[0], large, *record.candidates[2:]))
    scorer = CompareScorer("mine", Fixed(0.0), {})
    reply = scorer.reply(record.load(), PAIRS)
    assert isnan(reply.margins[0]) and isnan(reply.agrees[0]) and reply.margins[1] > 0
    assert "unlike sizes" in scorer.problem


def test_many_pairs_are_compared_in_parts_without_a_difference() -> None:
    pairs = [OrderedPair(a, b, 1.0, False) for a in range(8) for b in range(a + 1, 8)]
    judge = Fixed(0.0)
    margins = CompareScorer("mine", judge, {}).reply(loaded(8), pairs).margins
    assert judge.calls == 2 and len(margins) == 28
    alone = [CompareScorer("mine", judge, {}).reply(loaded(8), [pair]).margins[0] for pair in pairs]
    assert margins == pytest.approx(alone)


def test_a_real_judge_compares_antisymmetrically() -> None:
    scorer = CompareScorer("mine", family_judge("qwen2_5_vl", CompareJudge), {})
    given = loaded(side=32)
    turned = [OrderedPair(pair.worse, pair.better, 1.0, False) for pair in PAIRS]
    ahead, behind = scorer.reply(given, PAIRS), scorer.reply(given, turned)
    assert ahead.margins == pytest.approx([-margin for margin in behind.margins], abs=1e-5)
    assert ahead.agrees == behind.agrees and set(ahead.agrees) <= {0.0, 1.0}
    expected = scorer.judge.compare(
        *(image[None].float() / 255 for image in (given.lr_image, given.candidates[0], given.candidates[1]))
    )
    assert ahead.margins[0] == pytest.approx(expected.item(), abs=1e-5)


# Metrics


def metric(better: Any, judge: str = "", **fields: Any) -> Metric:
    def measure(sample: Sample) -> float:
        value = float(sample.sr_image.mean())
        if value < 0.45:
            raise RewardError("too dark")
        return value

    return Metric("grey", Protocol("grey", HR, "RGB", judge=judge), measure, better=better, **fields)


def test_metrics_keep_their_sign_and_their_limits() -> None:
    given = loaded()  # of brightness 137, 122, 107 and 92 of 255
    higher, lower = (MetricScorer(metric(better), "cpu") for better in ("higher", "lower"))
    assert higher.reply(given, PAIRS[:1]).margins[0] == pytest.approx(15 / 255, abs=0.02)
    assert lower.reply(given, PAIRS[:1]).margins[0] == pytest.approx(-15 / 255, abs=0.02)
    assert (higher.sees, MetricScorer(load_metric("lr_consistency"), "cpu").sees) == ("SR and HR", "SR and LR")
    with pytest.raises(ConfigError, match="neither direction"):
        MetricScorer(load_metric("gradient_energy"), "cpu")


@pytest.mark.parametrize(
    ("given", "fields", "problem"),
    [
        (loaded(with_hr=False), {}, "no HR images"),
        (replace(loaded(), hr_image=torch.zeros(3, 32, 32, dtype=torch.uint8)), {}, "HR images of other sizes"),
        (loaded(), {"min_side": 17}, "images under 17 pixels"),
    ],
)
def test_where_a_metric_cannot_be_taken_there_is_no_score(given: Any, fields: dict[str, Any], problem: str) -> None:
    scorer = MetricScorer(metric("higher", **fields), "cpu")
    assert all(map(isnan, scorer.reply(given, PAIRS).margins))
    assert problem in scorer.problem


def test_a_formula_without_a_value_is_no_score_and_a_reward_that_fails_is_told() -> None:
    dark = [OrderedPair(0, 3, 1.0, False)]
    scorer = MetricScorer(metric("higher"), "cpu")
    assert isnan(scorer.reply(loaded(), dark).margins[0]) and scorer.problem == "too dark"
    with pytest.raises(RewardError, match="too dark"):
        MetricScorer(metric("higher", judge="a reward's source"), "cpu").reply(loaded(), dark)


# How judges are named and opened


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["default"], [JudgeWord("default", "default", "rate")]),
        (["runs/rm/final"], [JudgeWord("final", "runs/rm/final", "rate")]),
        (["mine=runs/rm/final:compare"], [JudgeWord("mine", "runs/rm/final", "compare")]),
        (["runs/rm/final:reason"], [JudgeWord("final-reason", "runs/rm/final", "reason")]),
        (["a=org/x:reason_compare"], [JudgeWord("a", "org/x", "reason_compare")]),
        (
            ["org/name", "org/name:compare"],
            [JudgeWord("name", "org/name"), JudgeWord("name-compare", "org/name", "compare")],
        ),
        (["my_file.my_reward"], [JudgeWord("my_file.my_reward", "my_file.my_reward")]),
    ],
)
def test_words_name_judges_and_the_way_they_are_asked(words: list[str], expected: list[JudgeWord]) -> None:
    assert read_judges(words) == expected


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two models are called 'final'"):
        read_judges(["a/final", "b/final"])


def test_judges_of_every_kind_are_opened_with_what_identifies_them(tmp_path: Path, monkeypatch: Any) -> None:
    judge = family_judge("qwen2_5_vl")
    judge.save_pretrained(tmp_path / "mllm")
    ConvJudge(widths=(8, 8), hidden=8).save_pretrained(tmp_path / "conv")
    (tmp_path / "my_scorer_rewards.py").write_text("def one(completions, **columns):\n    return [1.0, 0.0, 0.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_scorer_rewards", raising=False)
    given = loaded(side=32)
    for source, ask, facts in (
        (tmp_path / "mllm", "rate", {"spec_hash", "weights_digest"}),
        (tmp_path / "mllm", "compare", {"spec_hash", "weights_digest"}),
        (tmp_path / "mllm", "reason", {"spec_hash", "weights_digest"}),
        (tmp_path / "conv", "rate", {"weights_digest"}),
        ("my_scorer_rewards.one", "rate", {"code"}),
    ):
        word: Any = JudgeWord("mine", str(source), ask)
        check_judge(word, JudgeOptions())
        scorer = open_judge(word, JudgeOptions())
        assert set(scorer.facts) == {"source", "ask"} | facts and scorer.facts["ask"] == ask
        reply = scorer.reply(given, PAIRS)
        assert len(reply.margins) == 2 and bool(reply.agrees) == (ask == "compare")
        if ask != "reason":  # an untrained judge's reasons hold no rating
            assert not any(map(isnan, reply.margins))


@pytest.mark.parametrize(
    ("source", "ask", "error", "message"),
    [
        ("heldout_judge", "compare", ConfigError, "only rates: it cannot compare"),
        ("math.nothing", "rate", ConfigError, "has no 'nothing'"),
        ("no/such/judge", "rate", CheckpointError, "no judge at"),
        ("no/such/judge", "compare", CheckpointError, "no judge at"),
    ],
)
def test_what_cannot_be_opened_is_told_before_anything_is_asked(
    source: str, ask: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_judge(JudgeWord("mine", source, ask), JudgeOptions())


def test_a_judge_that_was_not_made_to_compare_says_so(tmp_path: Path) -> None:
    family_judge("qwen2_5_vl", compare_prompt="").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not made to compare"):
        open_judge(JudgeWord("mine", str(tmp_path), "compare"), JudgeOptions())


def test_a_spec_is_for_the_model_of_its_name(tmp_path: Path) -> None:
    judge = family_judge("qwen2_5_vl")
    judge.model.save_pretrained(tmp_path)
    judge.tokenizer.save_pretrained(tmp_path)
    spec = family_spec("qwen2_5_vl", prompt="Is it?")
    file = tmp_path.parent / f"{tmp_path.name}.spec"
    file.write_text(spec.to_json())
    options = JudgeOptions(specs={"given": file})
    given, none = (open_judge(JudgeWord(name, str(tmp_path)), options).facts for name in ("given", "none"))
    assert given["weights_digest"] == none["weights_digest"]
    assert given["spec_hash"] == spec.hash != none["spec_hash"]

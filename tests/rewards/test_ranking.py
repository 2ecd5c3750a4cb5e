import json
import pickle
from typing import Any

import pytest

from refreward_trl.errors import ConfigError, RewardError
from refreward_trl.rewards.ranking import AnswerFormat, CorrectChoice, RankingFidelity, SwapConsistency


def says(*answers: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": f"<think>x</think><answer>{answer}</answer>"}] for answer in answers]


def group(*, mates: int = 2, answers: int = 2, name: str = "g") -> dict[str, Any]:
    candidate = [number for number in range(mates) for _ in range(answers)]
    truths = json.dumps([[i, j, 1.0] for i in range(mates) for j in range(i + 1, mates)])
    count = len(candidate)
    return {"group": [name] * count, "candidate": candidate, "mates": [mates] * count, "truths": [truths] * count}


class Log:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def __call__(self, name: str, value: float) -> None:
        self.values[name] = value


def test_format() -> None:
    assert AnswerFormat()(completions=[*says("4"), "4", [{"role": "assistant", "content": "<think>4"}]]) == [1, 0, 0]


def test_a_choice_earns_what_the_labels_say() -> None:
    log = Log()
    rewards = CorrectChoice()(
        completions=says("A", "B", "A", "B", "A", "C"), truth=[1.0, 1.0, 0.0, 0.0, 0.5, 1.0], log_metric=log
    )
    assert rewards == [1.0, 0.0, 0.0, 1.0, 0.5, 0.0]
    assert log.values["unreadable_answers"] == pytest.approx(1 / 6)


def test_always_the_first_is_inconsistent_and_the_same_candidate_is_consistent() -> None:
    columns: dict[str, Any] = {"group": ["p"] * 4, "shown": [[3, 7], [3, 7], [7, 3], [7, 3]]}
    assert SwapConsistency()(completions=says("A", "A", "A", "A"), **columns) == [0, 0, 0, 0]
    assert SwapConsistency()(completions=says("A", "A", "B", "B"), **columns) == [1, 1, 1, 1]
    assert SwapConsistency()(completions=says("A", "B", "B", "?"), **columns) == [1, 0, 0.5, 0]


def test_pairs_of_other_groups_do_not_count() -> None:
    columns: dict[str, Any] = {"group": ["p", "p", "q", "q"], "shown": [[0, 1], [1, 0], [0, 1], [1, 0]]}
    assert SwapConsistency()(completions=says("A", "B", "A", "A"), **columns) == [1, 1, 0, 0]


def test_a_question_without_its_swapped_one_is_refused() -> None:
    with pytest.raises(RewardError, match="the swapped question is not in the batch"):
        SwapConsistency()(completions=says("A"), group=["p"], shown=[[0, 1]])


def test_ratings_are_compared_inside_their_group_only() -> None:
    first, second = group(name="g"), group(name="h")
    both = {name: first[name] + second[name] for name in first}
    texts = says("5", "5", "1", "1", "1", "1", "5", "5")
    rewards = RankingFidelity()(completions=texts, **both)
    assert rewards[:4] == pytest.approx([1] * 4)
    assert rewards[4:] == pytest.approx([0] * 4, abs=1e-6)


def test_rows_may_come_in_any_order() -> None:
    columns = group(mates=3, answers=2)
    texts = says("5", "4", "3", "2", "2", "1")
    rewards = RankingFidelity()(completions=texts, **columns)
    order = [4, 0, 5, 2, 1, 3]
    turned = {name: [values[place] for place in order] for name, values in columns.items()}
    assert RankingFidelity()(completions=[texts[place] for place in order], **turned) == [
        rewards[place] for place in order
    ]


def test_a_missing_mate_is_refused() -> None:
    columns = {name: values[:2] for name, values in group(mates=2).items()}
    with pytest.raises(RewardError, match="1 of its 2 candidates are in the batch"):
        RankingFidelity()(completions=says("5", "4"), **columns)


def test_unreadable_answers_earn_nothing_and_are_counted() -> None:
    log = Log()
    texts = [*says("5", "9", "1"), [{"role": "assistant", "content": "<think> on and on"}]]
    rewards = RankingFidelity()(completions=texts, **group(), log_metric=log)
    assert rewards[0] == pytest.approx(1, abs=1e-3)
    assert (rewards[1], rewards[3]) == (0.0, 0.0)
    assert log.values["unreadable_answers"] == 0.5


def test_they_pickle_and_have_names() -> None:
    rewards = [AnswerFormat(), CorrectChoice(), SwapConsistency(), RankingFidelity(1, 10)]
    assert [reward.__name__ for reward in rewards] == ["format", "correct", "swap_consistency", "ranking"]
    assert pickle.loads(pickle.dumps(rewards[3])).high == 10


@pytest.mark.parametrize("make", [lambda: CorrectChoice(("A", "A")), lambda: RankingFidelity(5, 1)])
def test_impossible_settings_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()

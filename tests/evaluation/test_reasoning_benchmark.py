import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import family_judge

from refreward_trl.evaluation.reasoning_benchmark import GroupRewards, gains, reward_answers
from refreward_trl.reward_model.judge import MLLMJudge
from refreward_trl.rewards.ranking import AnswerFormat, CorrectChoice


def rows(groups: int = 3) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))

    return [
        {
            "prompt": [{"role": "user", "content": "Think, then choose."}],
            "images": [picture() for _ in range(3)],
            "group": f"g{number}",
            "photo": f"p{number}",
            "shown": [0, 1] if place == 0 else [1, 0],
            "truth": float(place == 0),
        }
        for number in range(groups)
        for place in range(2)
    ]


def speaking(judge: MLLMJudge, answer: str) -> MLLMJudge:
    """Makes the network say this whatever it sees."""
    ids = judge.tokenizer(answer, add_special_tokens=False).input_ids

    def generate(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], dim=1)

    judge.model.generate = generate  # type: ignore[method-assign]
    return judge


def asked(answer: str) -> GroupRewards:
    judge = speaking(family_judge("qwen2_5_vl", MLLMJudge), answer)
    return reward_answers(judge, rows(), [CorrectChoice(), AnswerFormat()], [1.0, 0.5], block=2, num_samples=3)


def test_always_the_first_is_right_half_the_time() -> None:
    found = asked("<think>x</think><answer>A</answer>")
    assert found.each["correct"].tolist() == [0.5] * 3
    assert found.each["format"].tolist() == [1.0] * 3
    assert found.summary() == {"reward": 1.0, "correct": 0.5, "format": 1.0}
    assert found.photos == ("p0", "p1", "p2")


def test_gains_are_paired_by_group() -> None:
    before, after = asked("no answer at all"), asked("<think>x</think><answer>A</answer>")
    risen = gains(before, after)
    assert risen["correct"].mean == pytest.approx(0.5)
    assert risen["format"].mean == 1.0
    assert risen["reward"].low <= risen["reward"].mean <= risen["reward"].high


def test_real_answers_repeat_and_differ_by_seed() -> None:
    judge = family_judge("qwen3_vl", MLLMJudge, max_new_tokens=8)
    texts: list[str] = []

    class Keep:
        __name__ = "keep"

        def __call__(self, *, completions: Any, **columns: Any) -> list[float | None]:
            texts.extend(completion[0]["content"] for completion in completions)
            return [None] * len(completions)

    for seed in (0, 0, 1):
        found = reward_answers(judge, rows(1), [Keep()], [1.0], block=2, num_samples=2, seed=seed)
        assert math.isnan(found.summary()["reward"])
    assert len(texts) == 12
    assert texts[:4] == texts[4:8] != texts[8:]

import math
from typing import TypeVar

import pytest
import torch
from tiny_judges import FAMILY_NAMES, byte_tokenizer, family_judge, family_network, family_spec

from refreward_trl.errors import CheckpointError, ConfigError, DataError
from refreward_trl.reward_model.question import shown_visuals
from refreward_trl.reward_model.reasoning import ReasonCompareJudge, ReasoningJudge, ReasonJudge
from refreward_trl.rewards.refreward import RefReward


def pair(rows: int = 2, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(rows, 3, side, side, generator=generator) for side in (size // 4, size))  # type: ignore[return-value]


Speaker = TypeVar("Speaker", bound=ReasoningJudge)


def speaking(judge: Speaker, *answers: str) -> Speaker:
    """Makes the network say these texts, one after the other, whatever it sees."""
    spoken = iter(answers)

    def generate(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        rows = [judge.tokenizer(next(spoken), add_special_tokens=False).input_ids for _ in range(len(input_ids))]
        longest = max(map(len, rows))
        padding = judge.tokenizer.pad_token_id
        new = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
        return torch.cat([input_ids, new], dim=1)

    judge.model.generate = generate
    return judge


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_writes_an_answer(family: str) -> None:
    judge = family_judge(family, ReasonJudge, max_new_tokens=5)
    answers = judge.reason(*pair())
    assert len(answers) == 2
    assert all(len(answer.answers) == 1 and isinstance(answer.answers[0], str) for answer in answers)
    again = judge.reason(*pair())
    assert [answer.answers for answer in again] == [answer.answers for answer in answers]


def test_stock_generation_is_used_as_it_is() -> None:
    judge = family_judge("qwen2_5_vl", ReasonJudge, max_new_tokens=4)
    lr_image, sr_image = pair(1)
    visuals = shown_visuals(lr_image, [sr_image], judge.spec)
    inputs = judge.prompt.token_inputs(visuals) | judge.family.pixel_inputs(visuals)
    step_by_step = inputs["input_ids"]
    for _ in range(4):
        ids = step_by_step
        grown = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), **judge.family.token_inputs(ids)}
        step_by_step = torch.cat([ids, judge.model(**grown).logits[:, -1:].argmax(-1)], dim=1)
    new = step_by_step[0, inputs["input_ids"].shape[1] :]
    expected = judge.tokenizer.decode(new, skip_special_tokens=True)
    (answer,) = judge.reason(lr_image, sr_image)
    assert expected.startswith(answer.answers[0])


def test_ratings_are_read_and_the_unreadable_is_nan() -> None:
    judge = speaking(
        family_judge("qwen2_5_vl", ReasonJudge), "<think>sharp</think><answer>4</answer>", "<think>I do not know"
    )
    first, second = judge.reason(*pair())
    assert (first.rating, first.unparsed) == (4.0, 0)
    assert math.isnan(second.rating)
    assert second.unparsed == 1


def test_samples_are_averaged_and_the_unreadable_left_out() -> None:
    judge = family_judge("qwen2_5_vl", ReasonJudge, options={"num_samples": 3, "temperature": 1.0})
    (answer,) = speaking(judge, "2", "?", "5").reason(*pair(1))
    assert (answer.rating, answer.unparsed, answer.answers) == (3.5, 1, ("2", "?", "5"))


def test_tiles_are_averaged_and_a_silent_tile_gives_no_rating() -> None:
    judge = family_judge("qwen2_5_vl", ReasonJudge)
    lr_image, sr_image = pair(1, size=64)
    (answer,) = speaking(judge, "1", "2", "3", "4").reason(lr_image, sr_image)
    assert answer.rating == 2.5
    (answer,) = speaking(judge, "1", "2", "", "4").reason(lr_image, sr_image)
    assert math.isnan(answer.rating)


def test_sampling_leaves_the_global_generator_alone_and_repeats() -> None:
    judge = family_judge("qwen3_vl", ReasonJudge, options={"num_samples": 2, "temperature": 1.0}, max_new_tokens=8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = judge.reason(*pair())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert [answer.answers for answer in judge.reason(*pair())] == [answer.answers for answer in first]
    assert first[0].answers[0] != first[0].answers[1]


def test_as_a_reward_an_unreadable_answer_is_not_scored() -> None:
    reward = RefReward("unused", ask="reason")
    reward._judge = speaking(family_judge("qwen2_5_vl", ReasonJudge), "3", "no number")
    lr_image, sr_image = pair()
    scores = reward(completions=sr_image, lr_image=lr_image)
    assert scores[0] == 3.0
    assert math.isnan(scores[1])  # type: ignore[arg-type]  (None and NaN both say "not scored")


@pytest.mark.parametrize(
    "options", [{"num_samples": 2}, {"num_samples": 0}, {"temperature": -1.0}, {"num_samples": 2, "temperature": 0.0}]
)
def test_samples_need_a_temperature(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="num_samples"):
        family_judge("qwen2_5_vl", ReasonJudge, options=options)


def test_a_judge_that_was_not_made_to_reason_says_so() -> None:
    tokenizer = byte_tokenizer("qwen2_5_vl")
    with pytest.raises(CheckpointError, match="no reason_prompt"):
        ReasonJudge(family_network("qwen2_5_vl", tokenizer), tokenizer, family_spec("qwen2_5_vl", reason_prompt=""))


def test_sampling_options_need_reasoning() -> None:
    with pytest.raises(ConfigError, match="go with ask: reason"):
        RefReward(num_samples=3, temperature=1.0)


# Choosing between two candidates


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_writes_a_choice_and_the_order_does_not_matter(family: str) -> None:
    judge = family_judge(family, ReasonCompareJudge, max_new_tokens=12)
    # What an untrained judge writes names no choice: the length of the text is made one.
    judge._choice = lambda text: 1.0 if len(text) % 2 else -1.0  # type: ignore[method-assign]
    lr_image, first = pair()
    second = first.flip(0)
    ahead = judge.compare(lr_image, first, second)
    assert ahead.shape == (2,)
    assert torch.equal(judge.compare(lr_image, second, first), -ahead)
    assert torch.equal(judge.compare(lr_image, first, first), torch.zeros(2))


@pytest.mark.parametrize(
    ("answers", "orders"),
    [
        (("<think>sharp</think><answer>A</answer>", "<think>no</think><answer>B</answer>"), (1.0, -1.0)),
        (("A", "A"), (1.0, 1.0)),
        (("A", "both A and B"), (1.0, math.nan)),
        (("<think>A", "B"), (math.nan, -1.0)),
    ],
)
def test_choices_are_read_in_both_orders(answers: tuple[str, str], orders: tuple[float, float]) -> None:
    lr_image, first = pair(1)
    judge = speaking(family_judge("qwen2_5_vl", ReasonCompareJudge), *answers)
    found = [float(order) for order in judge.compare_orders(lr_image, first, first.flip(2))]
    assert found == pytest.approx(orders, nan_ok=True)
    again = speaking(family_judge("qwen2_5_vl", ReasonCompareJudge), *answers)
    margin = float(again.compare(lr_image, first, first.flip(2)))
    assert margin == pytest.approx((orders[0] - orders[1]) / 2, nan_ok=True)


def test_choices_are_averaged_over_samples_and_tiles() -> None:
    options = {"num_samples": 2, "temperature": 1.0}
    lr_image, first = pair(1, size=64)  # four tiles
    spoken = ["A", "A", "A", "B", "A", "?", "B", "B"]
    judge = speaking(family_judge("qwen2_5_vl", ReasonCompareJudge, options=options), *spoken, *["B"] * 8)
    forward, backward = judge.compare_orders(lr_image, first, first.flip(2))
    assert (float(forward), float(backward)) == ((1 + 0 + 1 - 1) / 4, -1.0)


def test_candidates_of_two_sizes_are_not_compared() -> None:
    lr_image, first = pair(1)
    with pytest.raises(DataError, match="one size"):
        family_judge("qwen2_5_vl", ReasonCompareJudge).compare(lr_image, first, first[..., :16])


def test_a_judge_without_the_question_does_not_reason_about_two() -> None:
    with pytest.raises(CheckpointError, match="reason_compare_prompt"):
        family_judge("qwen2_5_vl", ReasonCompareJudge, reason_compare_prompt="")

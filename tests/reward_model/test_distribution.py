import math

import pytest
import torch
from tiny_judges import family_judge

from refreward_trl.reward_model.distribution import Spread, probability_better, score_spread
from refreward_trl.reward_model.reasoning import ReasonJudge


def pair(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(3, size // 4, size // 4, generator=generator),
        torch.rand(3, size, size, generator=generator),
    )


@pytest.mark.parametrize("size", [32, 48])
def test_the_mean_is_the_rating(size: int) -> None:
    judge = family_judge("qwen2_5_vl", prompt="How much {aspect}?")
    lr_image, sr_image = pair(size)
    spread = score_spread(judge, lr_image, sr_image)
    assert spread.mean == pytest.approx(float(judge.rate(lr_image[None], sr_image[None])), abs=1e-5)
    assert 0 < spread.std <= 2


def test_the_spread_is_that_of_the_rating_tokens() -> None:
    judge = family_judge("idefics3")
    lr_image, sr_image = pair()
    shares = judge.rating_logits(lr_image[None], sr_image[None])[0].double().softmax(-1)
    values = torch.arange(1.0, 6.0).double()
    mean = float(shares @ values)
    spread = score_spread(judge, lr_image, sr_image)
    assert spread.std == pytest.approx(math.sqrt(float(shares @ (values - mean).square())), abs=1e-6)


def test_a_reasoning_judge_has_it_in_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = family_judge("qwen2_5_vl", ReasonJudge, options={"num_samples": 4, "temperature": 1.0})
    for texts, expected in ((["2", "4", "?", "3"], (3.0, math.sqrt(2 / 3))), (["5"] * 4, (5.0, 0.0))):
        monkeypatch.setattr(judge, "write", lambda *args, texts=texts, **options: texts)
        assert score_spread(judge, *pair()) == pytest.approx(expected)
    monkeypatch.setattr(judge, "write", lambda *args, **options: ["?"] * 4)
    assert math.isnan(score_spread(judge, *pair()).mean)


def test_certainty_falls_with_the_spread() -> None:
    sure = probability_better(Spread(4, 0.1), Spread(3, 0.1))
    unsure = probability_better(Spread(4, 2.0), Spread(3, 2.0))
    assert 0.5 < unsure < sure <= 1
    assert probability_better(Spread(3, 0), Spread(3, 0)) == 0.5
    assert unsure + probability_better(Spread(3, 2.0), Spread(4, 2.0)) == pytest.approx(1)
    assert math.isnan(probability_better(Spread(3, 1), Spread(math.nan, math.nan)))

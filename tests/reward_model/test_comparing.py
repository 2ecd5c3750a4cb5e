import pytest
import torch
from tiny_judges import FAMILY_NAMES, byte_tokenizer, family_judge, family_network, family_spec

from refreward_trl.errors import CheckpointError, DataError
from refreward_trl.reward_model.comparing import CompareJudge
from refreward_trl.reward_model.judge import MLLMJudge
from refreward_trl.reward_model.reasoning import ReasonCompareJudge


def images(rows: int = 3, *, size: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (size // 4, size, size)
    return [torch.rand(rows, 3, side, side, generator=generator) for side in sizes]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("size", [32, 48])
def test_swapping_the_candidates_swaps_the_sign(family: str, size: int) -> None:
    judge = family_judge(family, CompareJudge)
    lr_image, first, second = images(size=size)
    odds = judge.compare(lr_image, first, second)
    assert odds.shape == (3,)
    assert odds.abs().max() > 1e-3
    torch.testing.assert_close(judge.compare(lr_image, second, first), -odds, rtol=0, atol=1e-6)
    assert judge.compare(lr_image, first, first).abs().max() < 1e-6


@pytest.mark.parametrize("size", [32, 48])
def test_the_answer_is_the_mean_of_both_orders(size: int) -> None:
    judge = family_judge("qwen2_5_vl", CompareJudge)
    lr_image, first, second = images(size=size)
    forward, backward = judge.compare_orders(lr_image, first, second)
    torch.testing.assert_close((forward - backward) / 2, judge.compare(lr_image, first, second))
    assert (forward + backward).abs().max() > 1e-3, "an untrained judge prefers a place"
    swapped = judge.compare_orders(lr_image, second, first)
    torch.testing.assert_close(torch.stack(swapped), torch.stack([backward, forward]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_lr_image_counts(family: str) -> None:
    judge = family_judge(family, CompareJudge)
    lr_image, first, second = images()
    odds = judge.compare(lr_image, first, second)
    assert (judge.compare(lr_image.flip(0), first, second) - odds).abs().max() > 1e-3


def test_a_graph_reaches_both_candidates() -> None:
    judge = family_judge("qwen2_5_vl", CompareJudge)
    lr_image, first, second = images()
    assert not judge.compare(lr_image, first, second).requires_grad
    first.requires_grad_()
    second.requires_grad_()
    judge.compare(lr_image, first, second).sum().backward()
    for pixels in (first, second):
        assert pixels.grad is not None
        assert (pixels.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(("count", "size", "options"), [(4, 32, {}), (3, 48, {}), (5, 32, {"batch_size": 3})])
def test_a_group_shares_work_without_changing_an_answer(
    family: str, count: int, size: int, options: dict[str, int]
) -> None:
    judge = family_judge(family, CompareJudge, options=options)
    lr_image, candidates, _ = images(count, size=size)
    table = judge.choose_group(lr_image[0], candidates)
    assert table.shape == (count, count)
    for i in range(count):
        for j in range(count):
            if i == j:
                assert table[i, j] == 0
            else:
                ahead, behind = judge.compare_orders(lr_image[:1], candidates[i : i + 1], candidates[j : j + 1])
                assert float(table[i, j]) == pytest.approx(float(ahead), abs=1e-5)
                assert float(table[j, i]) == pytest.approx(float(behind), abs=1e-5)
    assert (table + table.T).abs().max() > 1e-3, "the order is not asked both ways"


@pytest.mark.parametrize("kind", [CompareJudge, ReasonCompareJudge])
def test_a_judge_of_clips_cannot_compare(kind: type[MLLMJudge]) -> None:
    with pytest.raises(CheckpointError, match="with no place for a second candidate"):
        family_judge("qwen2_5_vl", kind, layout="clip")


@pytest.mark.parametrize("count", [2, 3, 8])
def test_win_rates_of_a_group_average_to_one_half(count: int) -> None:
    judge = family_judge("qwen3_vl", CompareJudge)
    lr_image, candidates, _ = images(count)
    rates = judge.win_rates(lr_image[0], candidates)
    assert rates.shape == (count,)
    assert float(rates.mean()) == pytest.approx(0.5, abs=1e-6)
    better = judge.compare(lr_image[:1], candidates[:1], candidates[1:2])
    if count == 2:
        assert float(rates[0]) == pytest.approx(float(better.sigmoid()), abs=1e-6)


def test_small_batches_change_nothing() -> None:
    lr_image, first, second = images(5)
    odds = [
        family_judge("idefics3", CompareJudge, options={"batch_size": size}).compare(lr_image, first, second)
        for size in (1, 4, 32)
    ]
    torch.testing.assert_close(odds[0], odds[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(odds[1], odds[2], rtol=0, atol=1e-5)


def test_candidates_of_two_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="candidates of one size"):
        family_judge("qwen2_5_vl", CompareJudge).compare(
            torch.rand(1, 3, 8, 8), torch.rand(1, 3, 32, 32), torch.rand(1, 3, 16, 16)
        )


def test_a_judge_that_was_not_made_to_compare_says_so() -> None:
    tokenizer = byte_tokenizer("qwen2_5_vl")
    spec = family_spec("qwen2_5_vl", compare_prompt="")
    with pytest.raises(CheckpointError, match="no compare_prompt"):
        CompareJudge(family_network("qwen2_5_vl", tokenizer), tokenizer, spec)

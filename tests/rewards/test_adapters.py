"""Foreign rewards in our contract, and our rewards in TRL's."""

from __future__ import annotations

import pickle

import pytest
import torch
from PIL import Image

from refreward_trl.data.images import to_pil, write_png
from refreward_trl.errors import DataError, RewardError
from refreward_trl.resampling import downscale
from refreward_trl.rewards import LRConsistency, completion_text, from_ddpo, from_pil, score_all, to_trl


def images(seed: int, *shape: int) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 255).round() / 255


SR = images(0, 4, 3, 16, 24)
LR = (downscale(SR, 4).clamp(0, 1) * 255).round() / 255


def score(reward, completions=SR, lr_image=LR, **columns):
    return score_all([reward], None, None, completions=completions, lr_image=lr_image, columns=columns)


# from_ddpo


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3)), {"ignored": True}


def echo(images, prompts, metadata):
    assert images.shape[0] == len(prompts) == len(metadata)
    assert isinstance(prompts, tuple) and isinstance(metadata, tuple)
    return [float(row["offset"]) + len(prompt) for prompt, row in zip(prompts, metadata, strict=True)], {}


def test_from_ddpo_keeps_values_graph_and_name():
    completions = SR.clone().requires_grad_()
    table = score(from_ddpo(brightness), completions)
    assert list(table.per_reward) == ["brightness"]
    torch.testing.assert_close(table.total, SR.mean(dim=(1, 2, 3)))
    table.total.sum().backward()
    assert completions.grad.isfinite().all() and completions.grad.abs().sum() > 0


def test_from_ddpo_hands_over_prompts_and_the_rows_columns():
    table = score(from_ddpo(echo), offset=[10, 20, 30, 40], prompt=["", "a", "", "bb"])
    assert table.total.tolist() == [10, 21, 30, 42]


def test_from_ddpo_puts_images_of_different_sizes_back_in_order():
    completions = [SR[0], images(5, 3, 8, 8), SR[2], images(6, 3, 8, 8)]
    table = score(from_ddpo(brightness), completions)
    assert table.total.tolist() == pytest.approx([image.mean().item() for image in completions])


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda images, prompts, metadata: [0.0] * len(images), "expected the pair"),
        (lambda images, prompts, metadata: ([0.0], {}), "returned 1 rewards, but 4"),
        (lambda images, prompts, metadata: (["x"] * 4, {}), "str 'x'"),
    ],
)
def test_from_ddpo_refuses_what_is_no_reward(fn, message):
    with pytest.raises(RewardError, match=message):
        score(from_ddpo(fn))


# from_pil


def height_and_corner(sr_pil, lr_pil):
    assert isinstance(sr_pil, Image.Image) and isinstance(lr_pil, Image.Image)
    return None if sr_pil.width == 8 else sr_pil.height / lr_pil.height + sr_pil.getpixel((0, 0))[0] / 1000


def red_corners(sr_pils, lr_pils):
    return [sr.getpixel((0, 0))[0] - lr.getpixel((0, 0))[0] for sr, lr in zip(sr_pils, lr_pils, strict=True)]


def test_from_pil_sees_the_exact_8_bit_pixels():
    table = score(from_pil(height_and_corner), SR.clone().requires_grad_())
    expected = 4 + (SR[:, 0, 0, 0] * 255).round() / 1000
    torch.testing.assert_close(table.total, expected)
    assert not table.total.requires_grad


def test_from_pil_in_batches_and_with_gaps():
    expected = ((SR[:, 0, 0, 0] - LR[:, 0, 0, 0]) * 255).round()
    torch.testing.assert_close(score(from_pil(red_corners, batched=True)).total, expected)
    narrow = [SR[0], SR[1, :, :, :8]]
    assert score(from_pil(height_and_corner), narrow, [LR[0], LR[1, :, :, :2]]).missing == {"height_and_corner": 1}


# to_trl


def pick(completion, columns):
    """A completion that is a digit picks a candidate of its row."""
    text = completion_text(completion).strip()
    return columns["candidates"][int(text)] if text.isdigit() else None


def explode(completion, columns):
    raise KeyError("candidates")


def rows(count: int = 4) -> dict:
    candidates = [[SR[row], (SR[row] * 0.9), SR[row].flip(0)] for row in range(count)]
    return {"lr_image": list(LR[:count]), "candidates": candidates}


def conversation(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def call(reward, completions, **columns):
    """As TRL calls it: by keyword, gradients on, token ids there."""
    columns = rows(len(completions)) | columns
    return reward(prompts=["?"] * len(completions), completions=completions, completion_ids=[[1]] * 4, **columns)


@pytest.mark.parametrize("wrap", [str, conversation])
def test_to_trl_scores_the_image_that_a_completion_names(wrap):
    reward = to_trl(LRConsistency(), pick)
    values = call(reward, [wrap(text) for text in ["0", "1", "no idea", "2"]])
    chosen = [SR[0], SR[1] * 0.9, None, SR[3].flip(0)]
    expected = LRConsistency()(completions=chosen, lr_image=LR)
    assert values == pytest.approx(expected)
    assert values[2] is None
    assert [type(value) for value in values if value is not None] == [float] * 3
    assert reward.__name__ == "lr_consistency"


def test_to_trl_takes_images_of_any_kind_and_another_lr_column(tmp_path):
    expected = call(to_trl(LRConsistency(), pick), ["0"] * 4)
    write_png(tmp_path / "sr.png", SR[3])
    mixed = [[SR[0]], [to_pil(SR[1])], [(SR[2] * 255).round().to(torch.uint8)], [tmp_path / "sr.png"]]
    lows = [to_pil(image) for image in LR]
    values = call(to_trl(LRConsistency(), pick, lr_column="low"), ["0"] * 4, candidates=mixed, low=lows)
    assert values == pytest.approx(expected, abs=1e-3)


def test_to_trl_gives_no_graph_even_for_images_with_one():
    candidates = [[image.clone().requires_grad_()] for image in SR]
    values = call(to_trl(LRConsistency(), pick), ["0"] * 4, candidates=candidates)
    assert [type(value) for value in values] == [float] * 4


def test_to_trl_hides_unparsable_rows_from_the_reward_and_spreads_its_log():
    seen = {}
    logged = {}

    def reward(*, prompts, completions, lr_image, log_metric, log_extra, trainer_state, **columns):
        assert not torch.is_grad_enabled()
        seen.update(columns, count=len(completions), state=trainer_state, prompts=prompts)
        log_extra("note", ["first", "second"])
        log_metric("seen", 2.0)
        return torch.tensor([1.0, torch.nan])

    values = call(
        to_trl(reward, pick),
        ["?", "0", "?", "1"],
        sample_id=["a", "b", "c", "d"],
        setting="same for all",
        log_extra=logged.__setitem__,
        log_metric=logged.__setitem__,
        trainer_state="state",
    )
    assert values == [None, 1.0, None, None]
    assert seen.pop("candidates")[0][0] is not None
    expected = {"count": 2, "state": "state", "prompts": ["?"] * 2, "sample_id": ["b", "d"], "setting": "same for all"}
    assert seen == expected | {"completion_ids": None}
    assert logged == {"note": [None, "first", None, "second"], "seen": 2.0}


def test_to_trl_does_not_call_the_reward_without_any_image():
    def reward(**columns):
        raise AssertionError("called")

    assert call(to_trl(reward, pick), ["?"] * 4) == [None] * 4


def test_to_trl_pickles_when_its_parts_do():
    reward = pickle.loads(pickle.dumps(to_trl(LRConsistency(), pick)))
    assert call(reward, ["0"] * 4) == call(to_trl(LRConsistency(), pick), ["0"] * 4)


@pytest.mark.parametrize(
    ("reward", "columns", "error", "message"),
    [
        (to_trl(LRConsistency(), pick, lr_column="lr"), {}, DataError, "no column 'lr'"),
        (to_trl(LRConsistency(), explode), {}, RewardError, "row 0: image_from raised KeyError"),
        (to_trl(LRConsistency(), lambda *_: 3), {}, DataError, "cannot read an image from int"),
        (to_trl(LRConsistency(), lambda *_: SR[0, :, :15]), {}, DataError, "whole multiple"),
        (to_trl(LRConsistency(), pick), {"lr_image": [None] * 4}, DataError, "column 'lr_image'"),
        (to_trl(lambda **columns: [1.0], pick), {}, RewardError, "returned 1 rewards, but 4"),
        (to_trl(lambda **columns: 1 / 0, pick), {}, RewardError, "ZeroDivisionError"),
    ],
)
def test_to_trl_explains_what_goes_wrong(reward, columns, error, message):
    with pytest.raises(error, match=message):
        call(reward, ["0"] * 4, **columns)


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        (conversation("said"), "said"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], "a"),
        ([{"role": "assistant", "content": None, "tool_calls": []}, *conversation("b")], "b"),
    ],
)
def test_completion_text(completion, text):
    assert completion_text(completion) == text

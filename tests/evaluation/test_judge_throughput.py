import argparse

import pytest

from benchmarks.judge_throughput import build_judge, images, measure, take_turns, token_counts


def arguments(**changes: object) -> argparse.Namespace:
    settings = {"candidates": 3, "size": 32, "width": 64, "layers": 1, "answer": 4, "repeats": 2, "device": "cpu"}
    return argparse.Namespace(**settings | changes)


@pytest.mark.parametrize("candidates", [1, 2, 8])
def test_tokens_of_the_lr_image_count_once_in_a_group(candidates: int) -> None:
    chosen = arguments(candidates=candidates)
    counts = token_counts(build_judge(chosen), *images(chosen))
    assert counts["batch"] - counts["group"] == (candidates - 1) * counts["shared"]
    assert counts["shared"] > 4  # the vision tokens of the LR image: 32 px on a grid of 16


def test_ways_take_turns_and_the_first_round_is_not_timed() -> None:
    order: list[str] = []
    seconds = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, "cpu")
    assert order == ["a", "b"] * 4
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_figures_of_a_small_run() -> None:
    figures = measure(arguments())
    assert figures["largest_difference"] < 1e-5
    assert figures["expected_ratio"] > 1
    assert figures["seconds_per_image"]["reason"] > figures["seconds_per_image"]["rate"]

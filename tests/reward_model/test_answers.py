import math
import time

import pytest

from refreward_trl.reward_model.answers import answer_of, has_format, parse_choice, parse_rating


def wrap(answer: str, thought: str = "sharp") -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("4", 4.0),
        (" 4. ", 4.0),
        ("3.5", 3.5),
        ("Rating: 2", 2.0),
        ("4/5", 4.0),
        ("4 out of 5", 4.0),
        ("4, that is 4", 4.0),
        ("{4}", 4.0),
        ("**5**", 5.0),
    ],
)
def test_one_number_in_range_is_read(answer: str, rating: float) -> None:
    assert parse_rating(wrap(answer), 1, 5) == rating
    assert parse_rating(answer, 1, 5) == rating  # a judge that was not asked to think


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "good",
        "four",
        "3 or 4",
        "between 2 and 3",
        "0",
        "6",
        "-4",
        "4e1",
        "4.5.6",
        "1,5",
        "x4",
        "4th",
        "٤",  # Arabic-Indic four
        "４",  # fullwidth four  # noqa: RUF001
        "④",
        "4/10",
        "nan",
        "inf",
        "{rating}",
    ],
)
def test_anything_else_is_no_rating(answer: str) -> None:
    assert math.isnan(parse_rating(wrap(answer), 1, 5))


@pytest.mark.parametrize(
    "text",
    [
        "<think>4",
        "<think>4</think>",
        "<answer>4",
        "4</answer>",
        "</answer>4<answer>",
        wrap("4") + wrap("4"),
        wrap("4") + "<answer>3</answer>",
        "<answer><answer>4</answer></answer>",
    ],
)
def test_an_answer_that_does_not_end_or_comes_twice_is_none(text: str) -> None:
    assert answer_of(text) is None
    assert math.isnan(parse_rating(text, 1, 5))
    assert parse_choice(text, ("4", "3")) is None
    assert not has_format(text)


def test_numbers_in_the_thought_do_not_count() -> None:
    assert parse_rating(wrap("2", thought="between 1 and 5, 3 or 4"), 1, 5) == 2.0


@pytest.mark.parametrize(
    ("answer", "choice"),
    [("A", "A"), (" B.", "B"), ("Image A is better", "A"), ("A or B", None), ("", None), ("a", None), ("AB", None)],
)
def test_choices(answer: str, choice: str | None) -> None:
    assert parse_choice(wrap(answer), ("A", "B")) == choice


def test_the_space_of_a_token_does_not_count() -> None:
    assert parse_choice("B", (" A", " B")) == " B"


def test_format_is_one_thought_and_one_answer() -> None:
    assert has_format(wrap("4"))
    assert has_format(f"  {wrap('4')}\n")
    assert has_format("<think>a</think> \n <answer>4</answer>")
    for text in ("4", "so " + wrap("4"), wrap("4") + " ok", "<answer>4</answer><think>a</think>"):
        assert not has_format(text)
    assert not has_format("<think>a</think> and <answer>4</answer>")


def test_an_endless_answer_is_read_in_linear_time() -> None:
    def seconds(length: int) -> float:
        texts = ["1" * length, "<answer>" * length, "4 " * length, "4." * length, wrap("+-" * length), "1/" * length]
        start = time.perf_counter()
        for text in texts:
            parse_rating(text, 1, 5)
            parse_choice(text, ("A", "B"))
            has_format(text)
        return time.perf_counter() - start

    seconds(1000)
    short, long = (min(seconds(length) for _ in range(3)) for length in (2000, 64_000))
    assert long < 32 * 20 * short  # quadratic would be 1024 times as long

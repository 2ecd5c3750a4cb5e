"""Reading what a judge wrote: a rating, a choice, or nothing. What cannot be read is no score.

An answer looks like `<think>..</think><answer>..</answer>`. Everything here runs in time linear in the text, which a
model wrote and nobody checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<![\w.,+-])[+-]?[0-9]+(?:\.[0-9]+)?(?![\w]|[.,][0-9])")
"""ASCII digits only: other scripts' digits are no answer that was asked for, and guessing is not reading."""
_OUT_OF = re.compile(r"^\s*([+-]?[0-9]+(?:\.[0-9]+)?)\s*(?:/|out of)\s*([0-9]+)\s*\.?\s*$", re.IGNORECASE)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def has_format(text: str) -> bool:
    """Says whether a text is one thought and then one answer: the four tags once each, in order, nothing around."""
    text = text.strip()
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    places = [text.index(tag) for tag in _TAGS]
    between = text[places[1] + len(_TAGS[1]) : places[2]]
    return places == sorted(places) and places[0] == 0 and text.endswith(_TAGS[3]) and not between.strip()


def answer_of(text: str) -> str | None:
    """Returns what stands in the answer tags; None if there is no answer, or more than one.

    A text without any tag is all answer, which is how a judge answers that was not asked to think.
    """
    if not any(tag in text for tag in _TAGS):
        return text
    if text.count(_TAGS[2]) != 1 or text.count(_TAGS[3]) != 1:
        return None
    start, end = text.index(_TAGS[2]) + len(_TAGS[2]), text.index(_TAGS[3])
    return text[start:end] if start <= end else None


def parse_rating(text: str, low: float, high: float) -> float:
    """Reads a rating.

    Args:
        text: What the judge wrote.
        low: The lowest rating that it may give.
        high: The highest; "4/5" and "4 out of 5" are read if this is the number below the line.

    Returns:
        The rating; NaN if there is no answer, no number in it, more than one different number, one out of range, or
        one in other digits than 0 to 9.
    """
    answer = answer_of(text)
    if answer is None:
        return math.nan
    share = _OUT_OF.match(answer)
    if share is not None and float(share.group(2)) == high:
        answer = share.group(1)
    if any(character.isdigit() and not character.isascii() for character in answer):
        return math.nan
    numbers = {float(number) for number in _NUMBER.findall(answer)}
    rating = numbers.pop() if len(numbers) == 1 else math.nan
    return rating if low <= rating <= high else math.nan


def parse_choice(text: str, tokens: Sequence[str]) -> str | None:
    """Reads which of several tokens was chosen.

    Args:
        text: What the judge wrote.
        tokens: The choices, as in `JudgeSpec.choice_tokens`; surrounding space does not count.

    Returns:
        The token as given; None if there is no answer, or if it names none of them or more than one.
    """
    answer = answer_of(text)
    if answer is None:
        return None
    words = set(re.findall(r"\w+", answer))
    named = [token for token in tokens if token.strip() in words]
    return named[0] if len(named) == 1 else None

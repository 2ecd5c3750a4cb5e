"""What `conftest.py` checks every call into the package with: shapes and types, after the call has returned.

Tests hand over wrong input on purpose, and the package itself must refuse it. So arguments are not checked before a
call, where the checker would refuse them first, but with the result: what was neither refused nor right is an error.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintException

_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the arguments and the result of `function`, one of two stand-ins that jaxtyping makes of each function.

    Left alone are the stand-in for the arguments (its result is `Any`), functions whose annotations are imported for
    type checkers only, and those that return `Self`, which beartype reads on whole classes alone.
    """
    try:
        if typing.get_type_hints(function).get("return") is Any:
            return function
        return _CHECK(function)
    except (NameError, BeartypeDecorHintException):
        return function

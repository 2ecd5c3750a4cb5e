"""An `ArgumentParser` in the house manner: a mistake becomes a `ConfigError` that names the nearest right word."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import NoReturn

from refreward_trl.errors import ConfigError


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the nearest of `words`, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


class CommandParser(argparse.ArgumentParser):
    """The parser of one command.

    Args:
        command: The words after `refreward`, e.g. `"score"`.
        description: One sentence.
        example: A command line that works as it stands.
    """

    def __init__(self, command: str, description: str, example: str) -> None:
        super().__init__(
            prog=f"refreward {command}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where=self.prog, fix=f"`{self.prog} --help` shows the options and an example")

    def parse_words(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses `argv`, refusing what is not an option of this command.

        Raises:
            ConfigError: A word is unknown, missing or of the wrong type.
        """
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            word = unknown[0].split("=")[0]
            self.error(f"unknown argument {word!r}{did_you_mean(word, self._option_string_actions)}")
        return arguments

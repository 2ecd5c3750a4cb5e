"""Reads a recipe and the flags beside it, strictly, and reports everything that is wrong at once.

Precedence is TrlParser's: a dataclass's default, then the recipe, then the command line. What differs is that an
unknown key, a wrong type, a value out of range or a duplicate key is an error that names line, key and the nearest
valid name, and that all this happens before torch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from refreward_trl.cli.keys import METHODS, Key, keys_of, load_schema, owners_of, show
from refreward_trl.cli.packaged import find_recipe
from refreward_trl.cli.parser import did_you_mean
from refreward_trl.cli.strict_yaml import Located, read_yaml
from refreward_trl.errors import ConfigError

METHOD_KEY = "method"
"""The one key of a recipe that is no dataclass field: which command the recipe is for."""

REQUIRED = {
    "finetune": ("output_dir",),
    "rm": ("output_dir",),
    "rm-sft": ("output_dir",),
    "rm-grpo": ("output_dir", "judge"),
    "refl": ("output_dir", "rewards"),
    "ddpo": ("output_dir", "rewards"),
    "data build": ("output_dir",),
}

_ENTRY_KEYS = {
    "name": Key("name", "reward", ("str",)),
    "weight": Key("weight", "reward", ("float",)),
    "kwargs": Key("kwargs", "reward", ("dict",)),
}
_DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_MOST_PROBLEMS = 15
_COMMAND_LINE = "command line"


class Problem(NamedTuple):
    """Something wrong in a recipe or a flag: the file or the command line, its line there (0 for none), what it is."""

    place: str
    line: int
    text: str

    @property
    def where(self) -> str:
        """`file:line`, or the place alone."""
        return f"{self.place}:{self.line}" if self.line else self.place


@dataclass(frozen=True)
class Recipe:
    """The checked settings of one run.

    Attributes:
        method: The command the recipe is for.
        source: The recipe's file as the user named it, or None where only flags were given.
        values: Every key that the recipe or a flag sets, by dataclass field name. Defaults are not filled in.
    """

    method: str
    source: str | None
    values: dict[str, Any]


def read_recipe(source: str | None, *, method: str | None = None, flags: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe, then lets the flags override it.

    Args:
        source: A recipe's file or packaged name (`cli.packaged.find_recipe`); None reads the flags alone.
        method: The command that asks; None trusts the recipe's own `method` key.
        flags: Words such as `["--learning_rate", "1e-4", "--use_cpu"]`; lists and mappings are JSON.

    Raises:
        ConfigError: Anything is wrong. The message lists every problem.
    """
    document, problems = _read_file(source) if source is not None else (Located({}, 1), [])
    place = source or _COMMAND_LINE
    if problems and not document.value:
        raise _refusal(problems, method)
    method, method_problems = _settle_method(document, method, place)
    if method is None:
        raise _refusal([*problems, *method_problems], method)
    keys = keys_of(method)
    entries = {name: entry for name, entry in document.value.items() if name != METHOD_KEY}
    problems += method_problems
    for name, entry in entries.items():
        problems += _check_entry(method, name, entry, place)
    values = {name: entry.plain() for name, entry in entries.items()}
    flag_values, flag_problems = _read_flags(flags, keys, method)
    problems += flag_problems
    values |= flag_values
    problems += [
        Problem(place, 0, f"{name}: nothing is set, and `refreward {method}` cannot do without ({keys[name].help})")
        for name in REQUIRED[method]
        if not values.get(name)
    ]
    if problems:
        raise _refusal(problems, method)
    return Recipe(method, source, values)


def _read_file(source: str) -> tuple[Located, list[Problem]]:
    path = find_recipe(source)
    document, complaints = read_yaml(_text_of(path, source))
    problems = [Problem(source, complaint.line, complaint.text) for complaint in complaints]
    if not isinstance(document.value, dict):
        problems.append(Problem(source, document.line, "expected `key: value` lines"))
        return Located({}, 1), problems
    return document, problems


def _text_of(path: Path, source: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            "this is not a text file in UTF-8", where=source, fix="name a recipe, a .yaml file"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", where=source, fix="check the file's permissions"
        ) from error


def _settle_method(document: Located, asked: str | None, place: str) -> tuple[str | None, list[Problem]]:
    named = document.value.get(METHOD_KEY)
    choices = ", ".join(METHODS)
    if named is None:
        missing = Problem(place, 0, f"nothing says which command this is for; add `method:` with one of {choices}")
        return asked, [] if asked is not None else [missing]
    if named.value not in METHODS:
        hint = did_you_mean(str(named.value), METHODS)
        return asked, [
            Problem(place, named.line, f"method: expected one of {choices}, got {show(named.plain())}{hint}")
        ]
    if asked is not None and named.value != asked:
        text = f"this recipe is for `refreward {named.value}`, not for `refreward {asked}`"
        return None, [Problem(place, named.line, text)]
    return named.value, []


def _check_entry(method: str, name: str, entry: Located, place: str) -> list[Problem]:
    keys = keys_of(method)
    if name not in keys:
        return [Problem(place, entry.line, _unknown(name, keys, method))]
    complaint = keys[name].complaint(entry.plain())
    if complaint is not None:
        return [Problem(place, entry.line, complaint)]
    if keys[name].types == ("list[reward]",):
        return list(_check_rewards(name, entry, place))
    return []


def _check_rewards(name: str, entry: Located, place: str) -> Iterator[Problem]:
    for index, reward in enumerate(entry.value or []):
        label = f"{name}[{index}]"
        if isinstance(reward.value, str):
            reward = Located({"name": reward}, reward.line)
        for key, value in reward.value.items():
            if key not in _ENTRY_KEYS:
                yield Problem(place, value.line, f"{label}: unknown key {key!r}{did_you_mean(key, _ENTRY_KEYS)}")
            elif complaint := _ENTRY_KEYS[key].complaint(value.plain()):
                yield Problem(place, value.line, f"{label}.{complaint}")
            elif key == "name" and (complaint := _name_complaint(value.value)):
                yield Problem(place, value.line, f"{label}.name: {complaint}")
        if "name" not in reward.value:
            yield Problem(place, reward.line, f"{label}: 'name' is missing")


def _name_complaint(name: str) -> str | None:
    known = load_schema()["reward_names"]
    if name in known or _DOTTED_PATH.fullmatch(name):
        return None
    others = f"; ours are {', '.join(known)}, yours is a path like my_file.my_reward"
    return f"there is no reward {name!r}{did_you_mean(name, known) or others}"


def _unknown(name: str, keys: Mapping[str, Key], method: str) -> str:
    if owners := owners_of(name):
        return f"unknown key {name!r}; `refreward {method}` has no such setting, `refreward {owners[0]}` has"
    return f"unknown key {name!r}{did_you_mean(name, keys)}"


def _read_flags(words: Sequence[str], keys: Mapping[str, Key], method: str) -> tuple[dict[str, Any], list[Problem]]:
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for flag, text in _pair_up(words):
        name = flag.removeprefix("--").replace("-", "_")
        complaint = None
        if not flag.startswith("--"):
            complaint = f"unexpected word {flag!r}; a setting is written --key value"
        elif name not in keys:
            complaint = _unknown(name, keys, method).replace("unknown key", "unknown flag")
        elif text is None and "bool" not in keys[name].types:
            complaint = f"--{name} needs a value: {keys[name].expected()}"
        if complaint is not None:
            problems.append(Problem(_COMMAND_LINE, 0, complaint))
            continue
        values[name] = True if text is None else keys[name].from_flag(text)
        problems += _check_entry(method, name, _locate(values[name]), _COMMAND_LINE)
    return values, problems


def _pair_up(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yields (flag, value) for `--flag value`, `--flag=value` and a bare `--flag`; a stray word comes as the flag."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--"):
            yield word, None
        elif "=" in word:
            flag, _, text = word.partition("=")
            yield flag, text
        elif position < len(words) and not words[position].startswith("--"):
            yield word, words[position]
            position += 1
        else:
            yield word, None


def _locate(value: Any) -> Located:
    if isinstance(value, dict):
        return Located({str(key): _locate(entry) for key, entry in value.items()}, 0)
    if isinstance(value, list):
        return Located([_locate(entry) for entry in value], 0)
    return Located(value, 0)


def _refusal(problems: Sequence[Problem], method: str | None) -> ConfigError:
    listing = f"`refreward {method or 'refl'} --help-all` lists every key"
    if len(problems) == 1:
        return ConfigError(problems[0].text, where=problems[0].where, fix=listing)
    # The recipe from its top to its end, then what is missing, then the flags.
    ordered = sorted(problems, key=lambda problem: (problem.place == _COMMAND_LINE, problem.line == 0, problem.line))
    lines = [f"  {problem.where}: {problem.text}" for problem in ordered[:_MOST_PROBLEMS]]
    if len(problems) > _MOST_PROBLEMS:
        lines.append(f"  and {len(problems) - _MOST_PROBLEMS} more")
    return ConfigError("\n".join([f"{len(problems)} problems", *lines]), fix=listing)

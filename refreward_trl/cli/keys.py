"""The keys a recipe may hold, read from `schema.json`, and what each accepts: known without importing torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from refreward_trl.cli.parser import did_you_mean
from refreward_trl.cli.strict_yaml import MAX_DEPTH, read_scalar

SCHEMA_FILE = Path(__file__).with_name("schema.json")

METHODS = ("finetune", "rm", "rm-sft", "rm-grpo", "refl", "ddpo", "data build")
"""The commands that read a recipe."""

ENTRY_TYPE = "reward"
"""Name of the type of one entry of `rewards`: a name, or a mapping {name, weight, kwargs}."""

_LARGEST_INT = 2**63 - 1
_BOUND = re.compile(r"(>=|>|<=|<)\s*(\S+)")

_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "list[str]": "a list of texts",
    "list[int]": "a list of whole numbers",
    "list[float]": "a list of numbers",
    "list[reward]": "a list of {name, weight, kwargs}",
}


def is_type(value: Any, type_name: str) -> bool:
    """Tells whether `value` is of the schema's type `type_name`; a bool is no number, an int is also a float.

    Numbers that no tensor can hold are of no type, nor is a text with a NUL, which no path can hold.
    """
    if type_name.startswith("list["):
        return isinstance(value, list) and all(is_type(entry, type_name[5:-1]) for entry in value)
    checks: dict[str, Callable[[Any], bool]] = {
        "int": lambda v: isinstance(v, int) and not isinstance(v, bool) and abs(v) <= _LARGEST_INT,
        "float": lambda v: is_type(v, "int") or (isinstance(v, float) and math.isfinite(v)),
        "bool": lambda v: isinstance(v, bool),
        "str": lambda v: isinstance(v, str) and "\0" not in v,
        "dict": lambda v: isinstance(v, dict),
        ENTRY_TYPE: lambda v: isinstance(v, dict | str),
    }
    return checks[type_name](value)


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: The dataclass field it sets.
        owner: The dataclass that has the field.
        types: Accepted types, by the names of `is_type`.
        nullable: Whether null is accepted.
        choices: Accepted texts; empty when any text will do.
        bounds: Accepted range of a number, e.g. `">= 0, < 1"`; empty when any finite number will do.
        default: The dataclass's default as JSON.
        help: One sentence.
    """

    name: str
    owner: str
    types: tuple[str, ...]
    nullable: bool = False
    choices: tuple[str, ...] = ()
    bounds: str = ""
    default: Any = None
    help: str = ""

    def expected(self) -> str:
        """Says what the key accepts, for an error message."""
        parts = []
        for name in self.types:
            if name == "str" and self.choices:
                parts.append("one of " + ", ".join(self.choices))
            elif name in ("int", "float") and self.bounds:
                parts.append(f"{_NAMES[name]} {self.bounds}")
            else:
                parts.append(_NAMES[name])
        return " or ".join([*parts, "null"] if self.nullable else parts)

    def complaint(self, value: Any) -> str | None:
        """Returns what is wrong with a value, or None.

        Args:
            value: Plain YAML or JSON data. The entries of a list of rewards are not looked into.
        """
        if value is None and self.nullable:
            return None
        matching = [name for name in self.types if is_type(value, name)]
        hint = ""
        if not matching:
            hint = self._type_hint(value)
        elif isinstance(value, str) and self.choices and value not in self.choices:
            hint = did_you_mean(value, self.choices)
        elif not isinstance(value, int | float) or isinstance(value, bool) or self._within(value):
            return None
        return f"{self.name}: expected {self.expected()}, got {show(value)}{hint}"

    def from_flag(self, text: str) -> Any:
        """Reads the value of a command-line flag: lists and mappings as JSON, numbers as in YAML.

        A text that fits no type is returned as it is, for `complaint` to refuse.
        """
        if text == "null" and self.nullable:
            return None
        if self._may_be_json(text):
            try:
                return _read_json(text)
            except ValueError:
                return text
        value = read_scalar(text)
        if any(name != "str" and is_type(value, name) for name in self.types):
            return value
        return text if "str" in self.types else value

    def _within(self, value: float) -> bool:
        compare: dict[str, Callable[[float, float], bool]] = {
            ">=": lambda v, b: v >= b,
            ">": lambda v, b: v > b,
            "<=": lambda v, b: v <= b,
            "<": lambda v, b: v < b,
        }
        return all(compare[sign](value, float(bound)) for sign, bound in _BOUND.findall(self.bounds.replace(",", " ")))

    def _type_hint(self, value: Any) -> str:
        if "bool" in self.types and isinstance(value, str) and value.lower() in ("yes", "on", "no", "off"):
            return f"; write {'true' if value.lower() in ('yes', 'on') else 'false'}"
        if "str" in self.types and isinstance(value, int | float):
            return "; write it in quotes"
        if isinstance(value, str) and not isinstance(read_scalar(value), str):
            return "; write it without quotes"
        if isinstance(value, str) and self._may_be_json(value):
            try:
                _read_json(value)
            except ValueError as error:
                return f"; as JSON it cannot be read: {error}"
            return "; write it without quotes"
        return ""

    def _may_be_json(self, text: str) -> bool:
        return text[:1] in ("[", "{") and any(name == "dict" or name.startswith("list[") for name in self.types)


def _read_json(text: str) -> Any:
    """Reads JSON as strictly as a recipe. Raises `ValueError`, also for what Python's own reader lets pass."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError("nested too deeply")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    entries = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(entry, levels - 1) for entry in entries)


def show(value: Any) -> str:
    """Shows a value in an error message, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


@cache
def load_schema() -> Mapping[str, Any]:
    """Returns `schema.json`: `classes` (name -> key -> facts), `methods` (name -> class names), `reward_names`."""
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


@cache
def keys_of(method: str) -> Mapping[str, Key]:
    """Returns every key a recipe of `method` may hold; a later class's field replaces an earlier one's."""
    schema = load_schema()
    keys: dict[str, Key] = {}
    for owner in schema["methods"][method]:
        for name, facts in schema["classes"][owner].items():
            keys[name] = Key(
                name=name,
                owner=owner,
                **{**facts, "types": tuple(facts["types"]), "choices": tuple(facts.get("choices", ()))},
            )
    return keys


def owners_of(key: str) -> list[str]:
    """Returns the methods that know `key`."""
    return [method for method in METHODS if key in keys_of(method)]

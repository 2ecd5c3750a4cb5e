"""YAML for recipes: line numbers are kept, duplicate keys are errors, and scalars mean what YAML 1.2 says they mean.

PyYAML alone reads `1e-5` as text, `no` as false and `12:30:45` as a number, and lets the last of two equal keys win.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml
from yaml.reader import ReaderError

MAX_DEPTH = 20
"""Levels of lists and mappings that a value may have."""

_OPENED = (
    "while parsing a flow sequence",
    "while parsing a flow mapping",
    "while scanning a simple key",
    "while scanning a quoted scalar",
)
"""What PyYAML was reading when something was found not to be closed: the mistake is where that begins."""

_INTEGER = re.compile(r"[-+]?[0-9]{1,100}")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]{1,100}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NAMED_FLOATS = {".nan": "nan", ".inf": "inf", "+.inf": "inf", "-.inf": "-inf"}
_NAMED = {"": None, "~": None, "null": None, "true": True, "false": False}


class Located(NamedTuple):
    """A YAML value and its line; sequences hold `Located`, mappings hold `str -> Located`."""

    value: Any
    line: int

    def plain(self) -> Any:
        """Returns the value without line numbers."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value


class Complaint(NamedTuple):
    """Something wrong on a line of a YAML text."""

    line: int
    text: str


class _Loader(yaml.SafeLoader):
    """Composes nodes only: no type is guessed, no alias followed, nothing is constructed."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed here", problem_mark=event.start_mark)
        if self.depth > MAX_DEPTH and not self.check_event(yaml.ScalarEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="lists and mappings are nested too deeply", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_scalar(text: str) -> str | int | float | bool | None:
    """Reads an unquoted word as YAML 1.2's core schema does; a bare `1e-5` is a number, `no` is text."""
    lowered = text.lower()
    if lowered in _NAMED:
        return _NAMED[lowered]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if lowered in _NAMED_FLOATS:
        return float(_NAMED_FLOATS[lowered])
    return text


def read_yaml(text: str) -> tuple[Located, list[Complaint]]:
    """Reads one YAML document.

    Returns:
        The document with line numbers (an empty mapping for an empty text), and everything that is wrong with it.
        Where the text cannot be parsed at all, the single complaint says so.
    """
    complaints: list[Complaint] = []
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.context_mark if error.context in _OPENED else error.problem_mark
        line = mark.line + 1 if mark else 1
        return Located({}, 1), [Complaint(line, f"not valid YAML: {error.problem or error.context}")]
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return Located({}, 1), [Complaint(line, f"not valid YAML: {str(error).splitlines()[0]}")]
    if node is None:
        return Located({}, 1), complaints
    return _located(node, complaints), complaints


def _located(node: yaml.Node, complaints: list[Complaint]) -> Located:
    line = node.start_mark.line + 1
    if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
        complaints.append(Complaint(line, f"the tag {node.tag!r} is not allowed"))
        return Located(None, line)
    if isinstance(node, yaml.ScalarNode):
        return Located(read_scalar(node.value) if node.style is None else node.value, line)
    if isinstance(node, yaml.SequenceNode):
        return Located([_located(entry, complaints) for entry in node.value], line)
    assert isinstance(node, yaml.MappingNode)
    entries: dict[str, Located] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            complaints.append(Complaint(key_line, "a key must be a word"))
            continue
        key = key_node.value
        if key in entries:
            complaints.append(Complaint(key_line, f"duplicate key {key!r} (first on line {entries[key].line})"))
            continue
        value = _located(value_node, complaints)
        entries[key] = Located(value.value, key_line)
    return Located(entries, line)

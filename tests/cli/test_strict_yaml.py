from __future__ import annotations

import math

import pytest

from refreward_trl.cli.strict_yaml import read_scalar, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("0x1F", 31),
        ("007", 7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("12:30:45", "12:30:45"),
        ("2024-01-02", "2024-01-02"),
        ("1_000", "1_000"),
        ("1e", "1e"),
    ],
)
def test_unquoted_words_are_read_as_yaml_1_2(text, value):
    read = read_scalar(text)
    assert read == value
    assert type(read) is type(value)


def test_infinity_and_nan_are_read_as_numbers():
    assert read_scalar("-.inf") == -math.inf
    assert math.isnan(read_scalar(".NaN"))


def test_quoted_words_stay_text():
    document, complaints = read_yaml("a: '1e-5'\nb: \"true\"\nc: |\n  3\n")
    assert document.plain() == {"a": "1e-5", "b": "true", "c": "3\n"}
    assert complaints == []


def test_lines_are_kept_at_every_depth():
    document, _ = read_yaml("# a comment\na: 1\n\nb:\n  - x: 2\n    y: 3\n")
    assert document.value["a"].line == 2
    assert document.value["b"].line == 4
    entry = document.value["b"].value[0]
    assert (entry.line, entry.value["x"].line, entry.value["y"].line) == (5, 5, 6)


def test_every_duplicate_key_is_reported_with_both_lines():
    document, complaints = read_yaml("a: 1\nb: 2\na: 3\nc: {d: 1, d: 2}\n")
    assert [(complaint.line, complaint.text) for complaint in complaints] == [
        (3, "duplicate key 'a' (first on line 1)"),
        (4, "duplicate key 'd' (first on line 4)"),
    ]
    assert document.plain() == {"a": 1, "b": 2, "c": {"d": 1}}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: !!python/object/apply:os.system [ls]", 1, "tag"),
        ("a: 1\nb: &x 2\nc: *x", 3, "alias"),
        ("a: [1, 2", 1, "not valid YAML"),
        ("b: 0\na: [1, 2\nc: 3\n", 2, "not valid YAML"),
        ("b: 0\na: 'x\nc: 3\n", 2, "not valid YAML"),
        ("a: b: c", 1, "not valid YAML"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("? [a, b]\n: 1", 1, "a key must be a word"),
        ("a: 1\nb: " + "[" * 5000, 2, "nested too deeply"),
        ("a: " + "[" * 21 + "]" * 21, 1, "nested too deeply"),
        ("a: 1\nb: \x00", 2, "not valid YAML"),
    ],
)
def test_what_is_not_plain_data_is_refused(text, line, message):
    _, complaints = read_yaml(text)
    assert len(complaints) == 1
    assert message in complaints[0].text
    assert complaints[0].line == line


def test_an_empty_text_is_an_empty_mapping():
    document, complaints = read_yaml("# nothing but a comment\n")
    assert document.plain() == {} and complaints == []

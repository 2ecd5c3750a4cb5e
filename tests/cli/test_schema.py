from __future__ import annotations

import dataclasses
import enum
from typing import Any, Literal

import pytest

from refreward_trl.cli.keys import METHODS, SCHEMA_FILE, Key, keys_of, load_schema
from refreward_trl.cli.schema import BOUNDS, CHOICES, HELP, LEFT_OUT, as_text, describe_class, describe_type, generate


class Colour(enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, {"types": ["int"]}),
        (float | None, {"types": ["float"], "nullable": True}),
        (None | str | list[str], {"types": ["str", "list[str]"], "nullable": True}),
        (Literal["a", "b"] | None, {"types": ["str"], "choices": ["a", "b"], "nullable": True}),
        (Colour | str, {"types": ["str"], "choices": ["red"]}),
        (dict[str, Any] | str | None, {"types": ["dict", "str"], "nullable": True}),
        (list[dict[str, Any]], {"types": ["list[reward]"]}),
    ],
)
def test_annotations_become_types_choices_and_null(annotation, expected):
    assert describe_type(annotation) == expected


def test_an_annotation_that_no_recipe_can_hold_is_refused():
    with pytest.raises(TypeError, match="cannot be written in a recipe"):
        describe_type(object)


def test_a_derived_class_lists_only_what_it_adds_or_changes():
    @dataclasses.dataclass
    class Base:
        seed: int = 1
        name: str = "a"

    @dataclasses.dataclass
    class Derived(Base):
        seed: int = 2
        beta: float = 0.0

    described = describe_class(Derived, Base)
    assert set(described) == {"seed", "beta"}
    assert described["seed"]["default"] == 2
    assert described["beta"]["bounds"] == ">= 0"


def test_the_schema_file_is_up_to_date_with_the_installed_classes():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == as_text(generate()), "run: python -m refreward_trl.cli.schema"


def test_every_entry_of_our_tables_is_a_key():
    known = {name for keys in load_schema()["classes"].values() for name in keys}
    assert set(BOUNDS) <= known
    assert set(CHOICES) <= known
    assert set(HELP) <= known
    assert not set(LEFT_OUT) & known


def test_every_default_passes_its_own_check():
    # TrainingArguments announces some fields as strings whose default is None or another enumeration's value.
    for method in METHODS:
        for key in keys_of(method).values():
            if key.owner != "TrainingArguments":
                assert key.complaint(key.default) is None, key


def test_our_own_keys_all_say_what_they_are():
    for method in METHODS:
        for key in keys_of(method).values():
            assert key.help or key.owner == "TrainingArguments", key


@pytest.mark.parametrize(
    ("types", "text", "value"),
    [
        (("float",), "1e-5", 1e-5),
        (("int",), "3", 3),
        (("str",), "3", "3"),
        (("str",), "true", "true"),
        (("str", "bool"), "true", True),
        (("str", "list[str]"), '["a", "b"]', ["a", "b"]),
        (("str", "list[str]"), "wandb", "wandb"),
        (("dict", "str"), '{"a": 1}', {"a": 1}),
        (("dict", "str"), "zero2.json", "zero2.json"),
        (("float",), "fast", "fast"),
    ],
)
def test_flags_are_read_by_the_type_of_their_key(types, text, value):
    assert Key("k", "C", types).from_flag(text) == value

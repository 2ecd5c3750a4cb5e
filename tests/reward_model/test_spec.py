import json
from dataclasses import replace

import pytest

from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.reward_model.spec import JudgeSpec


def test_json_round_trip_keeps_spec_and_hash() -> None:
    spec = JudgeSpec(layout="images", image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.2, 0.2))
    again = JudgeSpec.from_json(spec.to_json())
    assert again == spec
    assert again.hash == spec.hash
    assert hash(again) == hash(spec)


def test_hash_of_the_default_spec_is_pinned() -> None:
    # Every saved judge stores this hash; a change here orphans them.
    assert JudgeSpec().hash == "c1bee9ac4d620573"


def test_hash_does_not_depend_on_the_order_of_aspects() -> None:
    forward = JudgeSpec(aspects={"consistency": 0.5, "naturalness": 0.5})
    backward = JudgeSpec(aspects={"naturalness": 0.5, "consistency": 0.5})
    assert forward.hash == backward.hash


@pytest.mark.parametrize("change", [{"prompt": "rate"}, {"tile": 64}, {"layout": "images"}, {"name": "other"}])
def test_hash_changes_with_every_field(change: dict) -> None:
    assert replace(JudgeSpec(), **change).hash != JudgeSpec().hash


@pytest.mark.parametrize(
    "change",
    [
        {"tile": 100},
        {"layout": "collage"},
        {"rating_values": (1.0, 2.0)},
        {"image_mean": (0.5, 0.5, 0.5)},
    ],
)
def test_contradictions_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError):
        replace(JudgeSpec(), **change)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "one JSON object"),
        (json.dumps(json.loads(JudgeSpec().to_json()) | {"version": 7}), "version 7"),
        (json.dumps(json.loads(JudgeSpec().to_json()) | {"colour": 1}), "colour"),
    ],
)
def test_unreadable_json_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        JudgeSpec.from_json(text)

"""The question a judge is asked: prompt, image layout and the tokens that count as ratings.

A `JudgeSpec` is part of the weights: the same network asked another way gives another score. Its hash therefore goes
into every checkpoint, cache key and score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Literal

from refreward_trl.errors import CheckpointError, ConfigError

SPEC_VERSION = 1

ImageLayout = Literal["clip", "images"]
LRView = Literal["upsampled", "native"]

ASPECT_FIELD = "{aspect}"
"""Where it stands in a prompt, the judge is asked once per aspect; other braces mean nothing."""


_LATER: Mapping[str, Any] = {"written": "if not the default"}
"""Fields that older specs lack: left out of the JSON at their defaults, so that old hashes hold."""


@dataclass(frozen=True)
class JudgeSpec:
    """How a judge sees its images and how its answer becomes a number.

    Attributes:
        name: Name of the judge, for people.
        version: Version of this format; a reader refuses other versions.
        prompt: The text of the question, rendered through the tokenizer's chat template after the images.
        aspects: What is judged and with which weight; documents the prompt and the training labels.
        rating_tokens: Answers that count; each must be one token of the judge's tokenizer.
        rating_values: The number that each answer stands for. The rating is their expectation.
        parser: How generated text becomes a rating; `"rating_token"` reads one rating token.
        layout: `"clip"`: the upsampled LR and the SR image are the two frames of one clip and meet in the temporal
            patch embedding. `"images"`: two images, LR first, so that the candidates of one LR image share a prefix.
        tile: Side in pixels of the squares that larger images are cut into.
        patch: Side in pixels of a vision patch.
        merge: Patches per side that become one token.
        image_mean: Subtracted per channel from pixels in [0, 1]; None for plain [0, 1] pixels.
        image_std: Divides per channel after `image_mean`; None exactly when `image_mean` is.
        lr_view: `"upsampled"`: the LR image is enlarged bicubically to the SR size. `"native"`: shown as it is, with
            fewer vision tokens (layout `"images"` only).
        compare_prompt: The question about the LR image and two candidates; empty if the judge does not compare.
        choice_tokens: Its answers for the first and for the second candidate; each one token.
        reason_prompt: The question that asks for reasons before a rating; empty if the judge does not reason.
        reason_compare_prompt: The same before a choice between two candidates.
        max_new_tokens: The longest reasoned answer.

    Prompts are plain text: braces mean nothing in them, except `{aspect}` in `prompt`, which asks once for each of the
    `aspects`.

    Raises:
        ConfigError: The fields contradict each other.
    """

    name: str = "tiny-clip"
    version: int = SPEC_VERSION
    prompt: str = "rate consistency and naturalness"
    aspects: Mapping[str, float] = field(default_factory=lambda: {"consistency": 0.5, "naturalness": 0.5})
    rating_tokens: tuple[str, ...] = ("1", "2", "3", "4", "5")
    rating_values: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    parser: Literal["rating_token"] = "rating_token"
    layout: ImageLayout = "clip"
    tile: int = 128
    patch: int = 8
    merge: int = 2
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    lr_view: LRView = field(default="upsampled", metadata=_LATER)
    compare_prompt: str = field(default="", metadata=_LATER)
    choice_tokens: tuple[str, str] = field(default=("A", "B"), metadata=_LATER)
    reason_prompt: str = field(default="", metadata=_LATER)
    reason_compare_prompt: str = field(default="", metadata=_LATER)
    max_new_tokens: int = field(default=512, metadata=_LATER)

    def __post_init__(self) -> None:
        if self.layout not in ("clip", "images"):
            raise ConfigError(f"layout must be 'clip' or 'images', not {self.layout!r}", where="JudgeSpec.layout")
        if len(self.rating_tokens) != len(self.rating_values) or len(self.rating_tokens) < 2:
            raise ConfigError(
                f"{len(self.rating_tokens)} rating tokens for {len(self.rating_values)} rating values",
                where="JudgeSpec.rating_tokens",
                fix="give every rating token one value, at least two of them",
            )
        if (self.image_mean is None) != (self.image_std is None):
            raise ConfigError("image_mean and image_std must be given together", where="JudgeSpec.image_mean")
        if self.lr_view not in ("upsampled", "native") or (self.lr_view == "native" and self.layout == "clip"):
            raise ConfigError(
                f"lr_view {self.lr_view!r} does not go with layout {self.layout!r}",
                where="JudgeSpec.lr_view",
                fix="use 'upsampled', or 'native' with layout 'images'",
            )
        if len(self.choice_tokens) != 2 or self.choice_tokens[0] == self.choice_tokens[1]:
            raise ConfigError(
                f"{list(self.choice_tokens)} are not two different answers", where="JudgeSpec.choice_tokens"
            )
        if self.asks_per_aspect and not sum(self.aspects.values()) > 0:
            raise ConfigError("the prompt asks per aspect, and no aspect has weight", where="JudgeSpec.aspects")
        if self.tile < self.pixel_multiple or self.tile % self.pixel_multiple:
            raise ConfigError(
                f"tile {self.tile} is not a multiple of patch * merge = {self.pixel_multiple}",
                where="JudgeSpec.tile",
                fix=f"use {max(1, round(self.tile / self.pixel_multiple)) * self.pixel_multiple}",
            )

    @property
    def pixel_multiple(self) -> int:
        """Image sides must be multiples of this many pixels: `patch * merge`."""
        return self.patch * self.merge

    @property
    def asks_per_aspect(self) -> bool:
        """Whether the rating is the weighted mean of one answer per aspect."""
        return ASPECT_FIELD in self.prompt

    @property
    def rating_prompts(self) -> dict[str, tuple[str, float]]:
        """The questions to be rated, by aspect, with weights that sum to 1; `"overall"` alone if there is one."""
        if not self.asks_per_aspect:
            return {"overall": (self.prompt, 1.0)}
        total = sum(self.aspects.values())
        return {
            aspect: (self.prompt.replace(ASPECT_FIELD, aspect), weight / total)
            for aspect, weight in self.aspects.items()
            if weight > 0
        }

    @property
    def rating_range(self) -> tuple[float, float]:
        """The lowest and the highest rating that can come out."""
        return min(self.rating_values), max(self.rating_values)

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Returns the canonical JSON: sorted keys, no spaces."""
        unwritten = {item.name for item in fields(self) if item.metadata == _LATER and _is_default(self, item)}
        content = asdict(self) | {"aspects": dict(self.aspects)}
        content = {name: value for name, value in content.items() if name not in unwritten}
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str, *, where: str = "judge_spec.json") -> JudgeSpec:
        """Reads what `to_json` wrote.

        Args:
            text: The JSON text.
            where: Named in errors.

        Raises:
            CheckpointError: Not JSON, another version, or fields that are missing or unknown.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"not valid JSON ({error})", where=where, fix="copy the judge folder again"
            ) from error
        if not isinstance(content, dict):
            raise CheckpointError("must hold one JSON object", where=where, fix="copy the judge folder again")
        if content.get("version") != SPEC_VERSION:
            raise CheckpointError(
                f"judge spec version {content.get('version')!r}, this package reads version {SPEC_VERSION}",
                where=where,
                fix="use the package version that wrote the judge",
            )
        known = {item.name for item in fields(cls)}
        needed = {item.name for item in fields(cls) if item.metadata != _LATER}
        if wrong := sorted((needed - content.keys()) | (content.keys() - known)):
            raise CheckpointError(f"missing or unknown fields: {', '.join(wrong)}", where=where)
        try:
            return cls(**{name: _frozen(value) for name, value in content.items()})
        except (TypeError, ConfigError) as error:
            raise CheckpointError(
                f"not a judge spec: {error}", where=where, fix="copy the judge folder again"
            ) from error

    def __hash__(self) -> int:
        return int(self.hash, 16)


def _is_default(spec: JudgeSpec, item: Field[Any]) -> bool:
    return getattr(spec, item.name) == item.default


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

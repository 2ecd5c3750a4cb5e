"""How a figure is taken, said so completely that two figures may be compared exactly when it is the same.

PSNRs of RGB and of luma, or with and without a border, differ by decibels and look alike. So a figure never leaves its
protocol: both are saved together, the protocol's hash is checked when they are read again, and figures of unlike
protocols are refused, not converted. Imports no torch, so that the command line knows the names at once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from refreward_trl import __version__
from refreward_trl.errors import DataError

HR, LR, NOTHING = "hr_image", "lr_image", "nothing"
"""What a metric compares the SR image with."""

EIGHT_BITS = "SR image rounded to 8 bits, as a saved file is; values in [0, 1]"
OWN_PACKAGE = f"refreward_trl {__version__}"

METRICS = (
    *("psnr_y", "psnr_rgb", "ssim_y", "ssim_rgb", "lr_consistency", "gradient_energy", "refreward", "heldout_judge"),
    *("ms_ssim", "uqi", "scc", "vif", "stlpips", "pyiqa:ID"),
)
"""The metrics by name; every other name is a reward's dotted path."""

WITH_HR = ("psnr_y", "ssim_y", "lr_consistency", "gradient_energy", "refreward", "heldout_judge")
WITHOUT_HR = ("lr_consistency", "gradient_energy", "refreward", "heldout_judge")
"""What is measured when nobody says what."""


@dataclass(frozen=True)
class Protocol:
    """How one figure is taken.

    Attributes:
        metric: The metric's own name, e.g. "psnr" or "pyiqa musiq".
        against: "hr_image", "lr_image" or what else the SR image is held against; "nothing" without a reference.
        colour: Colour space, with its formula where there are several of that name.
        border: Pixels cut off at each side of the SR and HR image.
        pixels: Range and rounding.
        resampling: Which resampler the metric itself uses, or "none".
        details: Window, constants, caps, and what else the number depends on.
        package: Package and version that compute it.
        judge: Hashes of a judge's question and weights, or of the source of a reward; empty for formulas.
    """

    metric: str
    against: str
    colour: str
    border: int = 0
    pixels: str = EIGHT_BITS
    resampling: str = "none"
    details: str = ""
    package: str = OWN_PACKAGE
    judge: str = ""

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return digest(json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode())

    @property
    def text(self) -> str:
        """The protocol in one line, its hash last."""
        parts = [
            f"{self.metric} against {self.against}",
            f"colour: {self.colour}",
            f"border: {self.border} px cropped" if self.border else "border: none cropped",
            self.pixels,
            f"resampling: {self.resampling}",
            self.details,
            self.package,
            self.judge,
        ]
        return "; ".join(part for part in parts if part) + f" [{self.hash}]"

    def differences(self, other: Protocol) -> list[str]:
        """Says field by field where the two differ: `"border: 0 and 4"`."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} and {theirs[name]}" for name in mine if mine[name] != theirs[name]]

    def as_dict(self) -> dict[str, Any]:
        """The fields and the hash, for a JSON file."""
        return asdict(self) | {"hash": self.hash}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], *, where: str) -> Self:
        """Reads what `as_dict` gave.

        Raises:
            DataError: A field is missing, unknown or of the wrong type, or the hash belongs to another protocol.
        """
        kinds = {field.name: int if field.name == "border" else str for field in fields(cls)}
        wrong = sorted(content.keys() ^ {*kinds, "hash"}) or [
            name for name, kind in kinds.items() if not isinstance(content[name], kind)
        ]
        if wrong:
            raise DataError(
                f"the protocol's fields are missing, unknown or of the wrong type: {', '.join(wrong)}",
                where=where,
                fix="measure again with this version of the package",
            )
        protocol = cls(**{name: content[name] for name in kinds})
        if protocol.hash != content["hash"]:
            raise DataError(
                f"the protocol has the hash {protocol.hash}, but {content['hash']} was saved with it",
                where=where,
                fix="the file was edited: measure again",
            )
        return protocol


def digest(*parts: bytes) -> str:
    """First 16 hex digits of the SHA-256 of all parts, one after the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def package_version(package: str) -> str:
    """Returns `"name version"` of an installed distribution; "unknown version" for one without metadata."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package}, unknown version"

"""A protocol's hash must follow everything that changes a number, and a file must not claim another one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from refreward_trl.errors import DataError
from refreward_trl.evaluation.protocols import Protocol, digest, package_version

PROTOCOL = Protocol("psnr", "hr_image", "RGB", 4, details="dB")


@pytest.mark.parametrize("name", [field.name for field in fields(Protocol)])
def test_every_field_changes_the_hash_and_is_named_where_it_differs(name: str) -> None:
    other = replace(PROTOCOL, **{name: 8 if name == "border" else "another"})
    assert other.hash != PROTOCOL.hash
    (difference,) = PROTOCOL.differences(other)
    assert difference == f"{name}: {getattr(PROTOCOL, name)} and {getattr(other, name)}"
    assert PROTOCOL.differences(replace(PROTOCOL)) == []


def test_the_hash_is_pinned_so_that_saved_results_stay_comparable() -> None:
    assert Protocol("psnr", "hr_image", "RGB", 4, package="p 1").hash == "daa1256bfd76caf3"


def test_the_text_says_everything_once() -> None:
    text = PROTOCOL.text
    for part in ("psnr against hr_image", "RGB", "4 px cropped", "8 bits", "dB", "refreward_trl ", PROTOCOL.hash):
        assert text.count(part) == 1
    assert "none cropped" in replace(PROTOCOL, border=0).text


def test_what_was_saved_is_read_again() -> None:
    assert Protocol.from_dict(PROTOCOL.as_dict(), where="file") == PROTOCOL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"border": 0}, "was saved with it"),
        ({"hash": "0" * 16}, "was saved with it"),
        ({"border": "4"}, "border"),
        ({"window": 7}, "window"),
    ],
)
def test_an_edited_protocol_is_refused(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Protocol.from_dict(PROTOCOL.as_dict() | change, where="a/eval.json")
    assert caught.value.where == "a/eval.json"


def test_digests_and_versions() -> None:
    assert digest(b"ab", b"c") == digest(b"abc") != digest(b"abd")
    assert package_version("numpy").startswith("numpy 2")
    assert package_version("no-such-package") == "no-such-package, unknown version"


def test_the_names_are_known_without_torch() -> None:
    code = "import sys; import refreward_trl.evaluation.protocols; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

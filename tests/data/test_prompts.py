from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from refreward_trl.data.images import to_uint8, write_png
from refreward_trl.data.pairs import load_pairs
from refreward_trl.errors import ConfigError, DataError

TAGGER = """
def tag(photo):
    return f"a photo of {photo}"

def number(photo):
    return 3

constant = "x"
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        write_png(tmp_path / "photos" / f"{name}.png", to_uint8(torch.rand(3, 16, 16)))
        (tmp_path / "photos" / f"{name}.txt").write_text(f" tags,\n of {name} \n")
    return tmp_path / "photos"


def prompts(photos: Path, source: str | None, **options: int) -> list[str | None]:
    dataset = load_pairs(photos, degradation="bicubic", prompts=source, **options)
    return [dataset[index].get("prompt") for index in range(len(dataset))]


def test_text_files_beside_the_images(photos: Path) -> None:
    assert prompts(photos, "sidecar") == ["tags, of one", "tags, of two"]
    assert prompts(photos, None) == [None, None]


def test_every_crop_has_the_prompt_of_its_photo(photos: Path) -> None:
    found = prompts(photos, "sidecar", crop_size=8, crops_per_image=2)
    assert found == ["tags, of one", "tags, of two"] * 2


def test_lr_images_have_their_prompts_beside_them(tmp_path: Path) -> None:
    write_png(tmp_path / "lr" / "a.png", to_uint8(torch.rand(3, 8, 8)))
    (tmp_path / "lr" / "a.txt").write_text("low")
    write_png(tmp_path / "hr" / "a.png", to_uint8(torch.rand(3, 32, 32)))
    (tmp_path / "hr" / "a.txt").write_text("high")
    assert prompts(tmp_path, "sidecar") == ["low"]
    (tmp_path / "lr" / "a.txt").unlink()
    assert prompts(tmp_path, "sidecar") == ["high"]


def test_tables(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('photo,prompt,more\none,"a, b",x\ntwo,,y\nthree,c,z\n')
    assert prompts(photos, str(tmp_path / "p.csv")) == ["a, b", ""]
    (tmp_path / "p.json").write_text(json.dumps({"one": "ä", "two": "b"}))
    assert prompts(photos, str(tmp_path / "p.json")) == ["ä", "b"]


def test_a_function_of_the_photos_name(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tagger.py").write_text(TAGGER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    assert prompts(photos, "my_tagger.tag") == ["a photo of one", "a photo of two"]
    with pytest.raises(DataError, match="returned a int"):
        prompts(photos, "my_tagger.number")
    with pytest.raises(ConfigError, match="name a function"):
        prompts(photos, "my_tagger.constant")
    for source in ("my_tagger.gone", "gone.tag", "tag"):
        with pytest.raises(ConfigError, match="cannot import"):
            prompts(photos, source)


def test_photos_without_a_prompt_are_all_named(photos: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (photos / f"{name}.txt").unlink()
    with pytest.raises(DataError, match=r"(?s)2 of 2 .*one\.png.*two\.png"):
        prompts(photos, "sidecar")
    (tmp_path / "p.json").write_text('{"one": "x"}')
    with pytest.raises(DataError, match=r"(?s)1 of 2 .*two: no prompt in p\.json"):
        prompts(photos, str(tmp_path / "p.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"a,b\n1,2\n", "its columns are a, b"),
        ("p.csv", b"", "its columns are missing"),
        ("p.csv", b"\xff\xfe\x00", "cannot read the prompts"),
        ("p.json", b"{", "it is no JSON"),
        ("p.json", b"[" * 100_000, "it is no JSON"),
        ("p.json", b'{"one": 1}', "does not map photos to prompts"),
        ("p.json", None, "cannot read the prompts"),
    ],
)
def test_damaged_tables_are_refused(
    name: str, content: bytes | None, message: str, photos: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        prompts(photos, str(tmp_path / name))
    assert error.value.where == str(tmp_path / name)

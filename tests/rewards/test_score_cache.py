import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_judges import family_judge

from refreward_trl.errors import ConfigError
from refreward_trl.rewards.refreward import RefReward
from refreward_trl.rewards.score_cache import ScoreCache


def image(seed: int) -> torch.Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cache(tmp_path: Path) -> ScoreCache:
    return ScoreCache(tmp_path / "deep" / "scores.db", identity="judge")


def test_what_is_stored_is_found_to_the_last_bit(cache: ScoreCache) -> None:
    keys = [cache.key(image(0), image(index)) for index in range(4)]
    assert cache.find(keys) == [None] * 4
    cache.store({keys[0]: 1 / 3, keys[2]: -7.25, keys[3]: float("nan")})
    assert ScoreCache(cache.path, identity="judge").find(keys) == [1 / 3, None, -7.25, None]
    assert (cache.hits, cache.misses) == (0, 4)


def test_every_pixel_every_side_and_the_identity_are_in_the_key(cache: ScoreCache) -> None:
    changed = image(1)
    changed[2, 7, 7] += 1e-6
    keys = {
        cache.key(image(0), image(1)),
        cache.key(image(1), image(0)),
        cache.key(image(0), changed),
        cache.key(image(0), image(1).reshape(3, 4, 16)),
        ScoreCache(cache.path, identity="other").key(image(0), image(1)),
    }
    assert len(keys) == 5


@pytest.mark.parametrize("position", range(16))
def test_a_damaged_entry_is_a_miss(cache: ScoreCache, position: int) -> None:
    key = cache.key(image(0), image(1))
    cache.store({key: 2.5})
    with sqlite3.connect(cache.path) as database:
        (entry,) = database.execute("SELECT entry FROM scores").fetchone()
        bad = bytearray(entry)
        bad[position] ^= 4
        database.execute("UPDATE scores SET entry = ?", (bytes(bad),))
    assert cache.find([key]) == [None]
    cache.store({key: 2.5})
    assert cache.find([key]) == [2.5]


@pytest.mark.parametrize("content", ["text", 5, b"", None])
def test_an_entry_of_another_kind_is_a_miss(cache: ScoreCache, content: Any) -> None:
    key = cache.key(image(0), image(1))
    with sqlite3.connect(cache.path) as database:
        database.execute("INSERT INTO scores VALUES (?, ?)", (key, content))
    assert cache.find([key]) == [None]


def test_a_file_that_is_no_database_is_left_alone_and_said(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but someone's notes, long enough to have a header of a hundred bytes " * 3)
    before = path.read_bytes()
    with pytest.warns(RuntimeWarning, match=r"notes\.txt cannot be used"):
        cache = ScoreCache(path, identity="judge")
    key = cache.key(image(0), image(1))
    cache.store({key: 1.0})
    assert cache.find([key]) == [None]
    assert path.read_bytes() == before


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        ScoreCache(tmp_path, identity="judge")


class TestReward:
    """`RefReward(cache=...)`."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        family_judge("qwen2_5_vl").save_pretrained(tmp_path / "judge")
        return tmp_path / "judge"

    @pytest.fixture
    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(3, 3, 8, 8, generator=generator), torch.rand(3, 3, 32, 32, generator=generator)

    def test_known_images_are_not_judged_again(
        self, folder: Path, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lr_image, sr_image = batch
        reward = RefReward(folder, cache=folder / "scores.db")
        first = reward.score(list(lr_image[:2]), sr_image[:2])
        asked: list[int] = []
        again = RefReward(folder, cache=folder / "scores.db")
        rate = again.judge.rate
        monkeypatch.setattr(again.judge, "rate", lambda lr, sr: (asked.append(len(sr)), rate(lr, sr))[1])
        assert again.score(list(lr_image), sr_image)[:2] == first  # type: ignore[index]
        assert asked == [1]

    def test_other_weights_and_other_questions_have_other_entries(
        self, folder: Path, batch: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        lr_image, sr_image = batch
        cache = folder / "scores.db"
        before = RefReward(folder, cache=cache).score(list(lr_image), sr_image)
        other = family_judge("qwen2_5_vl", prompt="Is it blue?")
        other.save_pretrained(folder)
        assert RefReward(folder, cache=cache).score(list(lr_image), sr_image) != before

    def test_a_graph_is_never_cut(self, folder: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        lr_image, sr_image = batch
        reward = RefReward(folder, cache=folder / "scores.db")
        reward.score(list(lr_image), sr_image)
        pixels = sr_image.clone().requires_grad_()
        scores = reward(completions=pixels, lr_image=lr_image)
        assert isinstance(scores, torch.Tensor)
        assert scores.requires_grad

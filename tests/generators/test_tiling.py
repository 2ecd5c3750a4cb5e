"""Images in tiles: what the whole image gives, where that is defined, in a memory that does not grow."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.upscale_memory import jumps, seams
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.generators import Generator, tiling
from refreward_trl.generators.color_fix import COLOR_FIXES
from refreward_trl.generators.module import ModuleGenerator
from refreward_trl.generators.noise_field import NoiseField
from refreward_trl.generators.prompts import PromptEmbeds
from refreward_trl.generators.tile_grid import BlendedRows
from refreward_trl.generators.tiling import TensorImage, Tiling, UpscaleSettings, upscale_rows
from refreward_trl.resampling import downscale, upscale


class Bicubic(nn.Module):
    def forward(self, lr_image: Tensor) -> Tensor:
        return F.interpolate(lr_image, scale_factor=4, mode="bicubic", align_corners=False)


class Nearest(nn.Module):
    def forward(self, lr_image: Tensor) -> Tensor:
        return lr_image.repeat_interleave(4, -1).repeat_interleave(4, -2)


class NoiseGenerator(ModuleGenerator):
    """Its SR image is its input noise, enlarged."""

    @property
    def takes_noise(self) -> bool:
        return True

    def predict(self, z, cond, noise=None, *, model=None):
        assert noise is not None
        return self.denoiser(noise)


def lr_image(height: int = 53, width: int = 41, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def run(generator: Generator, image: Tensor, tile: int = 64, scratch: Path = Path(), **settings) -> Tensor:
    target = settings.pop("target", None)
    overlap, batch_size = settings.pop("overlap", None), settings.pop("batch_size", 1)
    chosen = UpscaleSettings(Tiling(tile, overlap, batch_size), scratch=scratch, **settings)
    return torch.cat(list(upscale_rows(generator, TensorImage(image), chosen, target=target)), 1)


@pytest.mark.parametrize("name", ["generator", "kl_generator", "noisy", "module"])
def test_an_image_in_one_tile_is_what_generate_returns(name, request, make_generator):
    made = {"noisy": lambda: make_generator(input_noise=0.5), "module": lambda: ModuleGenerator(Bicubic())}
    generator = made[name]() if name in made else request.getfixturevalue(name)
    image = lr_image(19, 13)
    assert torch.equal(run(generator, image, tile=80), generator.generate(image[None])[0])


@pytest.mark.parametrize("size", [(53, 41), (1, 70), (90, 3), (16, 17), (100, 16)])
def test_a_pointwise_generator_gives_the_same_in_tiles(size):
    image = lr_image(*size)
    assert torch.equal(run(ModuleGenerator(Nearest()), image), ModuleGenerator(Nearest()).generate(image[None])[0])


@pytest.mark.parametrize("overlap", [0, 8, 16, 40])
def test_a_constant_image_comes_out_constant_exactly(overlap):
    image = torch.tensor([0.1, 0.123457, 0.9])[:, None, None].expand(3, 50, 61).clone()
    found = run(ModuleGenerator(Bicubic()), image, overlap=overlap)
    whole = ModuleGenerator(Bicubic()).generate(image[None])[0]
    assert torch.equal(found, whole)
    assert (found - image[:, :1, :1]).abs().max() < 1e-6


def test_bicubic_in_tiles_is_bicubic():
    image = lr_image()
    torch.testing.assert_close(run(ModuleGenerator(Bicubic()), image), upscale(image[None], 4)[0], rtol=0, atol=3e-3)


@pytest.mark.parametrize("size", [(53, 41), (17, 90), (40, 1)])
def test_latent_generators_have_the_right_size_and_nearly_the_same_image(size, generator, kl_generator):
    for one in (generator, kl_generator):
        image = lr_image(*size)
        found, whole = run(one, image, color_fix="none"), run(one, image, 1024, color_fix="none")
        assert found.shape == (3, 4 * size[0], 4 * size[1])
        assert (found - whole).abs().mean() < 0.4 * whole.std()


def test_how_many_tiles_share_a_forward_changes_nothing(generator, make_generator):
    for one in (generator, make_generator(input_noise=0.5)):
        alone = run(one, lr_image())
        for batch_size in (2, 3, 16):
            torch.testing.assert_close(run(one, lr_image(), batch_size=batch_size), alone, rtol=0, atol=1e-5)


def test_a_batch_has_as_many_tiles_as_asked(generator):
    sizes = []
    encode = generator.encode
    with mock.patch.object(generator, "encode", lambda cond: sizes.append(len(cond)) or encode(cond)):
        run(generator, lr_image(16, 100), batch_size=3)
    assert sizes == [3, 3, 2]


def test_all_tiles_share_one_field_of_noise():
    image = lr_image(60, 70)
    expected = NoiseField(5, 3).window(0, 0, 60, 70)
    found = run(NoiseGenerator(Nearest()), image, seed=5)
    assert torch.equal(found, Nearest()(expected[None])[0].clamp(0, 1))


def test_the_seed_belongs_to_the_noise(make_generator):
    noisy = make_generator(input_noise=0.5)
    for tile in (64, 1024):
        assert torch.equal(run(noisy, lr_image(), tile, seed=1), run(noisy, lr_image(), tile, seed=1))
        assert not torch.equal(run(noisy, lr_image(), tile, seed=1), run(noisy, lr_image(), tile, seed=2))


@pytest.mark.parametrize("name", COLOR_FIXES)
def test_the_colour_fix_in_tiles_is_that_of_the_whole_image(name, make_generator, tmp_path):
    generator = make_generator(color_fix=name)
    image = lr_image(80, 41)
    plain = _decoded(generator, image)
    expected = COLOR_FIXES[name](plain[None], upscale(image[None], 4))[0].clamp(0, 1)
    torch.testing.assert_close(run(generator, image, scratch=tmp_path), expected, rtol=0, atol=2e-5)


def _decoded(generator: Generator, image: Tensor) -> Tensor:
    """The blended image before its colour fix, not clamped."""
    kept = []

    def keep(rows, source, scratch):
        for top in range(0, rows.size[0], 64):
            kept.append(rows.rows(top, min(top + 64, rows.size[0])))
            yield kept[-1]

    with mock.patch.dict(tiling.FIX_ROWS, {"none": keep}):
        run(generator, image, color_fix="none")
    return torch.cat(kept, 1)


def test_a_colour_fix_can_be_chosen(generator, tmp_path):
    image = lr_image()
    for tile in (64, 1024):
        fixed = run(generator, image, tile, scratch=tmp_path, color_fix="adain")
        source = upscale(image[None], 4)[0]
        torch.testing.assert_close(fixed.mean((1, 2)), source.mean((1, 2)), rtol=0, atol=0.01)


@pytest.mark.parametrize("target", [(106, 82), (53, 41), (159, 123), (281, 217), (424, 328), (212, 164), (213, 166)])
def test_any_size_comes_out(target):
    low = downscale(lr_image(212, 164, seed=2)[None], 4)[0].clamp(0, 1)
    low = F.avg_pool2d(low[None], 5, 1, 2, count_include_pad=False)[0]
    found = run(ModuleGenerator(Bicubic()), low, target=target)
    assert found.shape == (3, *target)
    expected = F.interpolate(low[None], target, mode="bicubic", antialias=True, align_corners=False)[0]
    assert (found - expected).abs().mean() < 0.01


def test_below_its_own_factor_the_result_is_reduced():
    image = lr_image()
    whole = ModuleGenerator(Nearest()).generate(image[None])
    expected = F.interpolate(whole, (106, 82), mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
    torch.testing.assert_close(run(ModuleGenerator(Nearest()), image, target=(106, 82)), expected, rtol=0, atol=1e-5)


def test_above_its_own_factor_the_image_is_enlarged_first():
    image = lr_image()
    larger = F.interpolate(image[None], (106, 82), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    expected = ModuleGenerator(Nearest()).generate(larger)[0]
    torch.testing.assert_close(run(ModuleGenerator(Nearest()), image, target=(424, 328)), expected, rtol=0, atol=1e-5)


def test_what_is_held_does_not_grow_with_the_height(generator, tmp_path):
    def held(height: int) -> int:
        rings = []
        make = BlendedRows.__init__

        def spy(self, *words):
            make(self, *words)
            rings.append(self._ring.numel())

        with mock.patch.object(BlendedRows, "__init__", spy):
            for fix in COLOR_FIXES:
                run(generator, lr_image(height, 17), color_fix=fix, scratch=tmp_path)
        return sum(rings)

    # Tiles are spread evenly, so that their overlap, and with it what is held, differs a little.
    assert held(160) < 1.15 * held(80)


def test_progress_adds_up_to_one(generator):
    for tile in (64, 1024):
        parts = []
        settings = UpscaleSettings(Tiling(tile))
        list(upscale_rows(generator, TensorImage(lr_image()), settings, on_progress=parts.append))
        assert sum(parts) == pytest.approx(1)
        assert len(parts) == (1 if tile == 1024 else 3 * 20)


def test_nothing_is_dropped_out():
    network = nn.Sequential(Nearest(), nn.Dropout(0.5))
    generator = ModuleGenerator(network.train())
    image = lr_image()
    assert torch.equal(run(generator, image), run(ModuleGenerator(Nearest()), image))
    assert network.training


@pytest.mark.parametrize("tile", [64, 1024])
def test_nan_is_refused(tile, generator):
    with torch.no_grad():
        generator.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="NaN"):
        run(generator, lr_image(), tile)


@pytest.mark.parametrize("tile", [64, 1024])
def test_the_prompt_reaches_every_tile(tile, generator):
    asked = []

    def encoder(texts):
        asked.append(len(texts))
        return PromptEmbeds(torch.full((len(texts), 2, 32), float(len(texts[0]))))

    generator.prompt_encoder = encoder
    images = [run(generator, lr_image(), tile, prompt=prompt, batch_size=2) for prompt in ("a cat", "a longer text")]
    assert not torch.equal(*images)
    assert set(asked) == {1 if tile == 1024 else 2}


def test_a_prompt_needs_a_text_encoder():
    with pytest.raises(ConfigError, match="takes no prompt"):
        run(ModuleGenerator(Nearest()), lr_image(), prompt="a cat")


@pytest.mark.parametrize("numbers", [{"tile": 0}, {"overlap": 64}, {"overlap": -1}, {"batch_size": 0}])
def test_impossible_tiles_are_refused(numbers):
    with pytest.raises(ConfigError):
        Tiling(**{"tile": 64, **numbers})


def test_halved_tiles_halve_their_overlap():
    assert Tiling(512, 100, 4).halved() == Tiling(256, 50, 4)
    assert Tiling(512).halved() == Tiling(256)


def test_the_shipped_generator_leaves_no_seam():
    figures = seams(1, 192, crops=1)
    assert figures["photos"] == 1 and figures["seam_lines"] > 4
    assert figures["worst_photo_over_untiled"] <= 1.1


def test_a_seam_would_be_seen():
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    image[:, 32:] += 0.2
    at, lines, beside, others = jumps(image, [[32], []], (1,)).tolist()
    assert (lines, others) == (1, 2) and at > 3 * beside / others

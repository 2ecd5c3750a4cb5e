from __future__ import annotations

import torch

from refreward_trl.generators.noise_field import NoiseField


def test_windows_that_share_pixels_share_their_noise():
    field = NoiseField(0, 3)
    large = field.window(10, 50, 150, 90)
    assert torch.equal(field.window(70, 61, 40, 30), large[:, 60:100, 11:41])


def test_it_is_standard_normal_without_repetition_and_belongs_to_its_seed():
    noise = NoiseField(0, 4).window(0, 0, 192, 192)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise[:, :64, :64] * noise[:, 64:128, 64:128]).mean()) < 0.05
    assert not torch.equal(noise, NoiseField(1, 4).window(0, 0, 192, 192))

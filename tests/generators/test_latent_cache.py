"""LR images that come again are encoded once, and a run does not notice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refreward_trl.generators.latent_cache import LatentCache


class Encoder:
    """Halves an image, and remembers how many it was given."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, image: Tensor) -> Tensor:
        self.seen.append(len(image))
        return image[..., ::2, ::2] * 3


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_equal_images_are_encoded_once_and_alone(images: Tensor) -> None:
    encode, cache = Encoder(), LatentCache(2**20)
    first = cache.encode(images, encode)
    again = cache.encode(images.flip(0), encode)
    assert encode.seen == [1, 1, 1, 1]
    assert torch.equal(first, encode(images))
    assert torch.equal(again, first.flip(0))


def test_images_are_told_apart_by_every_bit_and_by_their_shape(images: Tensor) -> None:
    encode, cache = Encoder(), LatentCache(2**20)
    cache.encode(images[:1], encode)
    near = images[:1].clone()
    near[0, 2, 7, 7] = torch.nextafter(near[0, 2, 7, 7], torch.tensor(2.0))
    assert torch.equal(cache.encode(near, encode), near[..., ::2, ::2] * 3)
    assert torch.equal(
        cache.encode(images[:1].view(1, 3, 4, 16), encode), images[:1].view(1, 3, 4, 16)[..., ::2, ::2] * 3
    )
    assert len(cache) == 3


def test_the_least_recently_used_are_dropped(images: Tensor) -> None:
    encode = Encoder()
    cache = LatentCache(2 * 3 * 4 * 4 * 4)  # two latents of 3 x 4 x 4 float32
    cache.encode(images[:2], encode)
    cache.encode(images[:1], encode)  # the second one is the oldest now
    cache.encode(images[2:3], encode)
    assert len(cache) == 2 and len(encode.seen) == 3
    cache.encode(images[[0, 2]], encode)
    assert len(encode.seen) == 3
    cache.encode(images[1:2], encode)
    assert len(encode.seen) == 4


def test_a_latent_that_is_too_large_is_not_kept(images: Tensor) -> None:
    encode, cache = Encoder(), LatentCache(10)
    assert torch.equal(cache.encode(images, encode), images[..., ::2, ::2] * 3)
    assert len(cache) == 0

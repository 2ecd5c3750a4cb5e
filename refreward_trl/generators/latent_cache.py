"""Latents of LR images that are seen again, kept in CPU memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


class LatentCache:
    """Encodes each image once, by its content, and drops what was used longest ago.

    Images are encoded one at a time: kernels may round differently in batches of other sizes, and what a run computes
    must not depend on what it has in its cache, which is empty after a restart.

    Args:
        max_bytes: The most that latents may take.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._latents: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._latents)

    def encode(self, images: Float[Tensor, "b 3 H W"], encode: Callable[[Tensor], Tensor]) -> Float[Tensor, "b c h w"]:
        """Returns the latents of images, on their device.

        Args:
            images: What is encoded.
            encode: `(1, 3, H, W)` -> `(1, c, h, w)`, without a graph; always the same function.
        """
        return torch.cat([self._one(image[None], encode) for image in images])

    def _one(self, image: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        content = image.detach().cpu().contiguous()
        key = hashlib.sha256(repr(tuple(content.shape)).encode() + content.numpy().tobytes()).digest()
        if key in self._latents:
            self._latents.move_to_end(key)
            return self._latents[key].to(image.device)
        latent = encode(image)
        self._keep(key, latent.cpu())
        return latent

    def _keep(self, key: bytes, latent: Tensor) -> None:
        if latent.nbytes > self.max_bytes:
            return
        self._latents[key] = latent
        self._bytes += latent.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._latents.popitem(last=False)[1].nbytes

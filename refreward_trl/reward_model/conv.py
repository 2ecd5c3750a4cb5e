"""A small convolutional judge: the held-out judge of evaluations, and a fast stand-in for the language-model judge."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refreward_trl.errors import CheckpointError
from refreward_trl.resampling import downscale, upscale
from refreward_trl.reward_model.preprocess import image_scale

CONFIG_FILE = "conv_judge.json"
WEIGHTS_FILE = "conv_judge.safetensors"
FORMAT_VERSION = 1


class _ResidualDown(nn.Module):
    """Halves the resolution, then adds one residual convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        self.norm_down = nn.GroupNorm(8, channels_out)
        self.conv = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.norm = nn.GroupNorm(8, channels_out)

    def forward(self, features: Tensor) -> Tensor:
        features = F.silu(self.norm_down(self.down(features)))
        return features + F.silu(self.norm(self.conv(features)))


class ConvJudge(nn.Module):
    """Scores an SR image against its LR image with a plain convolutional network of about 0.3 M parameters.

    It sees nine channels: the SR image, its difference to the upsampled LR image, and the LR-consistency residual
    `down(SR) - LR`. Every level is pooled by its mean and by the mean of its strongest 1/32 of positions, so that a
    small bad spot is not averaged away. The score has no bounds and no unit.

    Args:
        widths: Channels of the stem and of each residual level; multiples of 8.
        hidden: Width of the final MLP.
        seed: Seed of the random weights; the global random state is left alone.
    """

    def __init__(self, *, widths: Sequence[int] = (32, 48, 64, 96), hidden: int = 96, seed: int = 0) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.hidden = hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(9, self.widths[0], 5, stride=2, padding=2)
            pairs = zip(self.widths[:-1], self.widths[1:], strict=True)
            self.blocks = nn.ModuleList([_ResidualDown(before, after) for before, after in pairs])
            self.head = nn.Sequential(nn.Linear(2 * sum(self.widths), hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
        """Returns one score per image, higher is better; float pixels in [0, 1], any size.

        Raises:
            DataError: The SR size is not a whole multiple of the LR size.
        """
        scale = image_scale(lr_image, sr_image)
        residual = F.interpolate(downscale(sr_image, scale) - lr_image, scale_factor=scale)
        planes = [sr_image - 0.5, 4 * (sr_image - upscale(lr_image, scale)), 4 * residual]
        features = F.silu(self.stem(torch.cat(planes, dim=1)))
        pooled = [_pool(features)]
        for block in self.blocks:
            features = block(features)
            pooled.append(_pool(features))
        return self.head(torch.cat(pooled, dim=1)).squeeze(1)

    def rate(self, lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
        """Scores as `RateJudge.rate` does: with a graph exactly when `sr_image` needs one."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and sr_image.requires_grad):
            return self(lr_image, sr_image)

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Writes `conv_judge.json` and `conv_judge.safetensors`; arguments as in `RateJudge.save_pretrained`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        save_file({name: value.to(dtype=dtype).contiguous() for name, value in state.items()}, folder / WEIGHTS_FILE)
        content = {
            "class": "ConvJudge",
            "format_version": FORMAT_VERSION,
            "hidden": self.hidden,
            "widths": list(self.widths),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ConvJudge:
        """Reads what `save_pretrained` wrote; returns the judge in eval mode with frozen fp32 weights.

        Raises:
            CheckpointError: A missing, damaged or foreign file.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise CheckpointError(f"no {name}", where=str(folder), fix="give a folder written by ConvJudge")
        try:
            content = json.loads((folder / CONFIG_FILE).read_text())
            weights = load_file(folder / WEIGHTS_FILE)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"damaged file ({error})", where=str(folder), fix="copy the folder again") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"format version {version!r}, this package reads {FORMAT_VERSION}",
                where=str(folder / CONFIG_FILE),
                fix="use the version of the package that wrote it",
            )
        try:
            if len(content["widths"]) > len(weights):
                raise ValueError(f"{len(content['widths'])} levels, but only {len(weights)} weights")
            # Without memory for the weights until it is known that those of the file fit.
            with torch.device("meta"):
                judge = cls(widths=content["widths"], hidden=content["hidden"])
            judge.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
        except (RuntimeError, ValueError, TypeError, LookupError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"weights do not fit the network ({str(error).splitlines()[-1].strip()})",
                where=str(folder),
                fix="copy the folder again",
            ) from error
        return judge.float().eval().requires_grad_(False)


def _pool(features: Float[Tensor, "b c H W"]) -> Float[Tensor, "b two_c"]:
    flat = features.flatten(2)
    strongest = flat.topk(math.ceil(flat.shape[2] / 32), dim=2).values
    return torch.cat([flat.mean(dim=2), strongest.mean(dim=2)], dim=1)

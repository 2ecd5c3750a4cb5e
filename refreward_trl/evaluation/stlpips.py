"""Shift-tolerant LPIPS from the weights that `stlpips-pytorch` brings along, read as tensors only.

The package's Python is never imported: it needs torchvision, and parts of it are CC-BY-NC-SA-4.0. Whether its trunks
were started from weights under that licence is not stated, so the weights stay the user's own download.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import CheckpointError, SetupError

WEIGHTS = Path("weights", "vST0.0", "alex_shift_tolerant.pth")
INSTALL = "pip install --no-deps stlpips-pytorch==0.0.2 (without --no-deps it brings torchvision)"


class STLPIPS:
    """Shift-tolerant LPIPS (Ghildyal and Liu 2022) on its AlexNet: a perceptual distance to the HR image, 0 is equal.

    Args:
        weights: The file of weights.

    Raises:
        SetupError: The file is not there.
        CheckpointError: It holds no such weights.
    """

    LAYERS = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")
    POOLED = ("slice2.5", "slice3.9")  # the layers that a max pool precedes

    def __init__(self, weights: Path) -> None:
        try:
            self.weights: dict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise SetupError("the weights of ST-LPIPS are missing", where=str(weights), fix=INSTALL) from error
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"the weights of ST-LPIPS cannot be read: {error}", where=str(weights), fix=INSTALL
            ) from error
        needed = [f"net.{layer}.{part}" for layer in self.LAYERS for part in ("weight", "bias")]
        needed += [f"lin{index}.model.1.weight" for index in range(len(self.LAYERS))]
        needed += ["scaling_layer.shift", "scaling_layer.scale"]
        if missing := [name for name in needed if name not in self.weights]:
            raise CheckpointError(
                f"these are no weights of ST-LPIPS: {missing[0]!r} is missing", where=str(weights), fix=INSTALL
            )

    @classmethod
    def installed(cls) -> STLPIPS:
        """Reads the weights of the installed package, without importing it.

        Raises:
            SetupError: The package is not installed.
        """
        spec = importlib.util.find_spec("stlpips_pytorch")
        if spec is None or not spec.submodule_search_locations:
            raise SetupError("stlpips-pytorch is not installed", where="metric 'stlpips'", fix=INSTALL)
        return cls(Path(spec.submodule_search_locations[0], WEIGHTS))

    def to(self, device: torch.device | str) -> STLPIPS:
        """Moves the weights, in place, and returns the metric."""
        self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        return self

    def __call__(self, image: Float[Tensor, "b 3 H W"], hr_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
        """Distance of images in [0, 1]."""
        distances = []
        for index, features in enumerate(zip(self._features(image), self._features(hr_image), strict=True)):
            mine, theirs = (F.normalize(feature, dim=1, eps=1e-10) for feature in features)
            weighted = F.conv2d((mine - theirs).square(), self.weights[f"lin{index}.model.1.weight"])
            distances.append(weighted.mean(dim=(1, 2, 3)))
        return torch.stack(distances).sum(dim=0)

    def _features(self, image: Tensor) -> list[Tensor]:
        values = (2 * image - 1 - self.weights["scaling_layer.shift"]) / self.weights["scaling_layer.scale"]
        features = []
        for layer in self.LAYERS:
            if layer in self.POOLED:
                values = self._halve(F.max_pool2d(values, 3, stride=1))
            weight, bias = self.weights[f"net.{layer}.weight"], self.weights[f"net.{layer}.bias"]
            values = F.conv2d(values, weight, bias, padding=weight.shape[-1] // 2 if layer != "slice1.0" else 2)
            values = F.relu(self._halve(values) if layer == "slice1.0" else values)
            features.append(values)
        return features

    @staticmethod
    def _halve(values: Tensor) -> Tensor:
        """Every second value after a binomial blur: what makes the metric tolerate shifts."""
        taps = values.new_tensor([0.25, 0.5, 0.25])
        kernel = (taps[:, None] * taps).expand(values.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(values, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=values.shape[1])

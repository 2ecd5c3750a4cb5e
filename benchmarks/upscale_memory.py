"""What `refreward upscale` needs in memory and time as the image grows, and what its seams look like.

    OMP_NUM_THREADS=1 python benchmarks/upscale_memory.py [--sizes 1024 4096] [--format png]
    OMP_NUM_THREADS=1 python benchmarks/upscale_memory.py --seams 12 [--tile 96]

Each size is upscaled by the shipped generator in a process of its own, from a quarter of it. Memory is the peak of the
whole run (loading, computing, writing) above what the process holds when everything is imported. A seam line is where
a tile begins or ends; its jump is the mean difference of the two rows (or columns) next to it, over that of its
neighbours: the line to each side, or all lines up to 8 pixels away. A photo has edges of its own, and a VAE's decoder
a grid, with or without tiles. Therefore jumps are pooled over random crops of many photos, so that edges even out, and
the untiled images' ratio at the same lines stands beside it; no photo's ratio may be far above its untiled one either.
Exits with 1 beyond a bound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

MOST_MEMORY = 1.5
MOST_TIME = 1.2
MOST_JUMP = 1.1
NEIGHBOURS = {"next": (1,), "near": range(1, 9)}
"""How far from a seam, in pixels, the lines lie that it is compared with."""
CROPS = 5
RESAMPLES = 2000
PHOTOS = Path(__file__).resolve().parents[1] / "refreward_trl" / "assets" / "photos"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 4096], help="sides of the outputs, in pixels")
    parser.add_argument("--format", default="png", choices=("png", "jpg", "webp", "tif"))
    parser.add_argument("--color-fix", default=None, choices=("adain", "wavelet", "none"))
    parser.add_argument("--tile", type=int, help="side of a tile; default: the command's own")
    parser.add_argument("--seams", type=int, metavar="PHOTOS", help="measure the seams of so many photos instead")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(upscale_once(Path(arguments.worker[0]), Path(arguments.worker[1]), arguments)))
        return 0
    figures = seams(arguments.seams, arguments.tile or 128) if arguments.seams else growth(arguments)
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["within_bounds"] else 1


def growth(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs every size in a fresh process and compares the largest with the smallest."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sorted(arguments.sizes):
            source, target = Path(folder, f"{size}.png"), Path(folder, f"out_{size}.{arguments.format}")
            lr_photo(size // 4).save(source)
            command = [sys.executable, __file__, "--worker", str(source), str(target)]
            for name in ("color_fix", "tile"):
                if getattr(arguments, name) is not None:
                    command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append({"size": size} | json.loads(done.stdout.splitlines()[-1]))
            print(runs[-1], file=sys.stderr)
    first, last = runs[0], runs[-1]
    memory = last["above_imports_mb"] / first["above_imports_mb"]
    pace = last["seconds_per_megapixel"] / first["seconds_per_megapixel"]
    return {
        "format": arguments.format,
        "color_fix": arguments.color_fix or "the generator's",
        "runs": runs,
        "memory_ratio": round(memory, 3),
        "time_per_pixel_ratio": round(pace, 3),
        "within_bounds": memory <= MOST_MEMORY and pace <= MOST_TIME,
    }


def upscale_once(source: Path, target: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Upscales one image in this process and returns what it took."""
    import diffusers  # noqa: F401
    import peft  # noqa: F401

    import refreward_trl.generators.epsilon  # noqa: F401
    from refreward_trl.cli.upscale_jobs import find_jobs
    from refreward_trl.cli.upscale_run import UpscaleOptions, peak_memory, run

    cpu = torch.device("cpu")
    imports = peak_memory(cpu)["main"] or 0
    began = time.monotonic()
    run(find_jobs(source, target), UpscaleOptions(color_fix=arguments.color_fix, tile=arguments.tile or "auto"))
    seconds = time.monotonic() - began
    with Image.open(target) as image:
        pixels = image.width * image.height
    return {
        "imports_mb": imports,
        "above_imports_mb": (peak_memory(cpu)["main"] or 0) - imports,
        "seconds": round(seconds, 2),
        "seconds_per_megapixel": round(seconds / pixels * 1e6, 3),
    }


def lr_photo(size: int) -> Image.Image:
    """A photo laid out again and again, `size` pixels square."""
    with Image.open(sorted(PHOTOS.glob("*.webp"))[0]) as photo:
        pixels = np.asarray(photo.convert("RGB"))
    repeats = (-(-size // pixels.shape[0]), -(-size // pixels.shape[1]), 1)
    return Image.fromarray(np.tile(pixels, repeats)[:size, :size])


def seams(count: int, tile: int, crops: int = CROPS) -> dict[str, Any]:
    """Upscales crops of photos with and without tiles and compares the jumps across seams with those beside them."""
    from refreward_trl.data.images import read_image, to_float
    from refreward_trl.generators import load_generator
    from refreward_trl.generators.tiling import TensorImage, Tiling, UpscaleSettings, upscale_rows
    from refreward_trl.resampling import downscale

    generator = load_generator("default")
    paths = sorted(PHOTOS.glob("*.webp"))
    paths = paths[:: max(1, len(paths) // count)][:count]
    tiling, source = Tiling(tile), torch.Generator().manual_seed(0)
    tiled, untiled = ({name: [] for name in NEIGHBOURS} for _ in range(2))
    for path in paths:
        photo = to_float(read_image(path))[None]
        sums = torch.zeros(2, len(NEIGHBOURS), 4)
        for _ in range(crops):
            top, left = torch.randint(0, 64, (2,), generator=source).tolist()
            lr_image = downscale(photo[..., top:, left:], generator.scale)[0].clamp(0, 1)
            axes = tiling.axes(generator, (lr_image.shape[-2], lr_image.shape[-1]))
            lines = [seam_lines(axis.starts, axis.length, generator.scale) for axis in axes]
            rows = upscale_rows(generator, TensorImage(lr_image), UpscaleSettings(tiling))
            for place, image in enumerate((torch.cat(list(rows), 1), generator.generate(lr_image[None])[0])):
                sums[place] += torch.stack([jumps(image, lines, reach) for reach in NEIGHBOURS.values()])
        for number, name in enumerate(NEIGHBOURS):
            tiled[name].append(sums[0, number])
            untiled[name].append(sums[1, number])
        print(f"{path.name}: {_ratio(sums[0, -1]):.3f}, untiled {_ratio(sums[1, -1]):.3f}", file=sys.stderr)
    pooled = {name: {"tiled": _pooled(tiled[name]), "untiled": _pooled(untiled[name])} for name in NEIGHBOURS}
    worst = max(_ratio(a) / _ratio(b) for name in NEIGHBOURS for a, b in zip(tiled[name], untiled[name], strict=True))
    return {
        "tile": tile,
        "photos": len(paths),
        "crops": crops,
        "seam_lines": int(sum(float(sums[1]) for sums in tiled["near"])),
        "jump_over_neighbours": pooled,
        "worst_photo_over_untiled": round(worst, 3),
        "within_bounds": max(worst, *(pooled[name]["tiled"][0] for name in NEIGHBOURS)) <= MOST_JUMP,
    }


def _ratio(sums: torch.Tensor) -> float:
    """The mean jump at seams over the mean jump beside them, of sums and counts of both."""
    at, lines, beside, others = sums.tolist()
    return (at / lines) / (beside / others)


def _pooled(photos: list[torch.Tensor]) -> list[float]:
    """The ratio of all photos together, with a 95 % bootstrap interval over photos."""
    sums, source = torch.stack(photos), torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=source)
    ratios = sorted(_ratio(sums[index].sum(0)) for index in drawn)
    limits = (ratios[int(RESAMPLES * 0.025)], ratios[int(RESAMPLES * 0.975)])
    return [round(value, 3) for value in (_ratio(sums.sum(0)), *limits)]


def seam_lines(starts: tuple[int, ...], length: int, scale: int) -> list[int]:
    """Returns the lines where tiles begin or end, but for the image's own border, in SR pixels."""
    ends = [start + length for start in starts[:-1]]
    return sorted({line * scale for line in [*starts[1:], *ends]})


def jumps(image: torch.Tensor, lines: list[list[int]], reach: Iterable[int]) -> torch.Tensor:
    """Returns the sum and the number of jumps at the seams, and of those beside them, `(4,)`, rows and columns."""
    return _jumps(image, lines[0], reach) + _jumps(image.transpose(1, 2), lines[1], reach)


def _jumps(image: torch.Tensor, lines: list[int], reach: Iterable[int]) -> torch.Tensor:
    across = (image[:, 1:] - image[:, :-1]).abs().mean((0, 2))
    lines = [line for line in lines if line < image.shape[1]]
    near = [line + step for line in lines for distance in reach for step in (-distance, distance)]
    at = across[[line - 1 for line in lines]]
    beside = across[[line - 1 for line in near if 0 < line < image.shape[1] and line not in lines]]
    return torch.stack([at.sum(), torch.tensor(len(at)), beside.sum(), torch.tensor(len(beside))])


if __name__ == "__main__":
    sys.exit(main())

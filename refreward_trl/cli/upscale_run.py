"""All images of one `refreward upscale`: what happens when one fails or memory ends, the progress, the manifest."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreward_trl.cli.json_file import write_json
from refreward_trl.cli.upscale_image import Sizes, target_size, upscale_image
from refreward_trl.cli.upscale_jobs import Job
from refreward_trl.errors import CheckpointError, ConfigError, DataError, RefRewardError, SetupError

if TYPE_CHECKING:
    import torch

    from refreward_trl.generators import Generator
    from refreward_trl.generators.tiling import Tiling

CPU_TILE = 512
GPU_TILE = 1024
SMALLEST_TILE = 64
"""Output pixels; where even this does not fit into memory, tiles are not what is too large."""

_MOST_SHOWN = 20
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "DefaultCPUAllocator", "out of memory")


@dataclass(frozen=True)
class UpscaleOptions:
    """What the user chose; see `refreward upscale --help`."""

    generator: str = "default"
    family: str | None = None
    base_model: str | None = None
    scale: float | None = None
    tile: int | str = "auto"
    overlap: int | None = None
    color_fix: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    batch_size: int = 1
    seed: int = 0
    prompt: str | None = None
    skip_existing: bool = False
    quality: int = 95
    json: Path | None = None


@dataclass
class Entry:
    """What became of one image; sizes are (width, height)."""

    input: str
    output: str
    status: str = "pending"
    size_in: tuple[int, int] | None = None
    size_out: tuple[int, int] | None = None
    tile: int | None = None
    seconds: float | None = None
    error: dict[str, str | None] | None = None


@dataclass
class _Failure:
    """The first error of a run, kept for its traceback, and how many there were."""

    first: Exception | None = None
    count: int = 0
    entries: list[Entry] = field(default_factory=list)


def run(jobs: list[Job], options: UpscaleOptions) -> None:
    """Upscales every image and says at the end what became of them.

    Raises:
        DataError: Some images failed; the others are done.
        ConfigError: An option does not fit the generator, or the machine.
        CheckpointError: The generator cannot be read.
    """
    entries = [Entry(str(job.source), str(job.target)) for job in jobs]
    started = time.monotonic()
    generator = open_generator(options)
    failure = _Failure()
    try:
        _upscale_all(generator, jobs, entries, options, failure)
    finally:
        if options.json is not None:
            write_json(options.json, manifest(entries, options, generator, time.monotonic() - started))
    print(_summary(entries, time.monotonic() - started, generator.device))
    if failure.count:
        raise _as_error(failure, len(entries)) from failure.first


def open_generator(options: UpscaleOptions) -> Generator:
    """Loads the generator onto its device."""
    import torch

    from refreward_trl.generators import load_generator

    device, dtype = _device(options.device), getattr(torch, options.dtype)
    published = {"family": options.family, "base_model": options.base_model}
    if ":" in options.generator and not Path(options.generator).exists():
        generator = load_generator(options.generator, **published)
        generator.denoiser.to(dtype)
    else:
        generator = load_generator(options.generator, dtype=dtype, **published)
    return generator.to(device)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SetupError(
            f"the device {name!r} cannot be used: {str(error).splitlines()[0]}",
            where="--device",
            fix="use auto, cpu, or what `refreward env` lists under accelerators",
        ) from error
    return device


def _upscale_all(
    generator: Generator, jobs: list[Job], entries: list[Entry], options: UpscaleOptions, failure: _Failure
) -> None:
    from tqdm import tqdm

    from refreward_trl.generators.tiling import Tiling

    scale = options.scale or float(generator.scale)
    tile = options.tile if isinstance(options.tile, int) else _auto_tile(generator)
    tiling = Tiling(tile, options.overlap, options.batch_size)
    pixels = [_output_pixels(job, scale) for job in jobs]
    with tqdm(total=sum(pixels), desc="upscale", unit="px", unit_scale=True, file=sys.stderr) as bar:
        for job, entry, count in zip(jobs, entries, pixels, strict=True):
            began = bar.n
            if options.skip_existing and job.target.exists():
                entry.status = "skipped"
            else:
                bar.set_postfix_str(job.source.name)
                tiling = _upscale_one(
                    generator, job, entry, options, tiling, failure, lambda part, n=count: bar.update(part * n)
                )
            bar.update(began + count - bar.n)


def _auto_tile(generator: Generator) -> int:
    return CPU_TILE if generator.device.type == "cpu" else GPU_TILE


def _output_pixels(job: Job, scale: float) -> int:
    """Returns how much work an image is; one that cannot be read is none, and is refused when its turn comes."""
    from refreward_trl.data.images import read_size

    try:
        height, width = target_size(read_size(job.source), scale)
    except RefRewardError:
        return 0
    return height * width


def _upscale_one(
    generator: Generator,
    job: Job,
    entry: Entry,
    options: UpscaleOptions,
    tiling: Tiling,
    failure: _Failure,
    on_progress: Callable[[float], Any],
) -> Tiling:
    """Upscales one image, writes down what became of it, and returns the tiles to go on with."""
    began = time.monotonic()
    try:
        sizes, used = _in_memory(generator, job, options, tiling, on_progress)
    except (ConfigError, CheckpointError):
        entry.status = "failed"
        raise
    except Exception as error:
        # Whatever is wrong with this image, or with this generator at its size: the others still have their turn.
        entry.status, entry.error = "failed", _told(error, job)
        failure.first = failure.first or error
        failure.count += 1
        failure.entries.append(entry)
        used = tiling
    else:
        entry.status, entry.tile = "done", used.tile
        entry.size_in, entry.size_out = _width_first(sizes.before), _width_first(sizes.after)
    entry.seconds = round(time.monotonic() - began, 3)
    return used


def _in_memory(
    generator: Generator, job: Job, options: UpscaleOptions, tiling: Tiling, on_progress: Callable[[float], Any]
) -> tuple[Sizes, Tiling]:
    """Upscales one image with tiles that fit into memory, and returns its sizes and those tiles."""
    from refreward_trl.generators.tiling import UpscaleSettings

    scale = options.scale or float(generator.scale)
    while True:
        done = 0.0

        def advance(part: float) -> None:
            nonlocal done
            done += part
            on_progress(part)

        settings = UpscaleSettings(tiling, options.color_fix, options.seed, options.prompt)
        try:
            sizes = upscale_image(generator, job, settings, scale=scale, quality=options.quality, on_progress=advance)
            return sizes, tiling
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if tiling.tile // 2 < SMALLEST_TILE:
                raise DataError(
                    f"it does not fit into memory, even in tiles of {tiling.tile} pixels",
                    where=str(job.source),
                    fix="free memory, use --dtype bfloat16 or a smaller --batch-size, or cut the image",
                ) from error
        # Here the error is gone, and with it the tensors that its traceback held.
        tiling = tiling.halved()
        on_progress(-done)
        _free()


def _width_first(size: tuple[int, int]) -> tuple[int, int]:
    return size[1], size[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error means that memory has ended, in main memory or on an accelerator."""
    import torch

    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _told(error: Exception, job: Job) -> dict[str, str | None]:
    """Returns what, where and how to mend it."""
    if isinstance(error, RefRewardError):
        return {"what": error.what, "where": error.where or str(job.source), "fix": error.fix}
    words = (str(error).strip().splitlines() or [""])[0]
    fix = f"see the traceback: refreward upscale {job.source} OUT --debug"
    return {"what": f"{type(error).__name__}: {words}", "where": str(job.source), "fix": fix}


def _as_error(failure: _Failure, total: int) -> DataError:
    lines = []
    for entry in failure.entries[:_MOST_SHOWN]:
        error = entry.error or {}
        lines.append(f"  {error['where']}: {error['what']}")
        lines += [f"    fix: {error['fix']}"] if error["fix"] else []
    if failure.count > _MOST_SHOWN:
        lines.append(f"  and {failure.count - _MOST_SHOWN} more; --json MANIFEST lists them all")
    return DataError("\n".join([f"{failure.count} of {total} images failed", *lines]))


def _summary(entries: list[Entry], seconds: float, device: torch.device) -> str:
    counts = {status: sum(entry.status == status for entry in entries) for status in ("done", "skipped", "failed")}
    parts = [f"{count} {status}" for status, count in counts.items() if count or status == "done"]
    memory = ", ".join(f"{name} {mb} MB" for name, mb in peak_memory(device).items() if mb is not None)
    return f"{', '.join(parts)} of {len(entries)} images in {seconds:.1f} s; peak memory: {memory}"


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Returns the most memory that the process has held so far, in MB."""
    import torch

    # Linux counts in KB, macOS in bytes.
    unit = 1024**2 if sys.platform == "darwin" else 1024
    main = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
    cuda = torch.cuda.max_memory_allocated(device) // 1024**2 if device.type == "cuda" else None
    return {"main": main, "gpu": cuda}


def manifest(entries: list[Entry], options: UpscaleOptions, generator: Generator, seconds: float) -> dict[str, Any]:
    """Returns what the JSON manifest holds."""
    settings = asdict(options) | {"json": str(options.json)}
    settings |= {
        "scale": options.scale or generator.scale,
        "color_fix": options.color_fix or generator.color_fix,
        "device": str(generator.device),
    }
    return {
        "settings": settings,
        "generator": {"class": type(generator).__name__, "scale": generator.scale},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("refreward-trl", "torch", "diffusers", "pillow")},
        "peak_memory_mb": peak_memory(generator.device),
        "seconds": round(seconds, 3),
        "images": [asdict(entry) for entry in entries],
    }

"""How much memory, time and disk a run will take, from the shapes of its tensors.

The trainer itself takes a step and evaluates an image on networks without content (`trainers.shape_trace`); what does
not follow from that (the optimizer's state, averages, what ZeRO divides) is counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from refreward_trl.generators.base import Generator
from refreward_trl.trainers.base import AlignmentTrainer, eval_mode
from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer
from refreward_trl.trainers.shape_trace import Peak, ShapeTrace, Work

FLOAT32 = 4
LEAST_8BIT = 4096
"""Entries of a weight below which an 8-bit optimizer keeps its state in 32 bits."""
CUDA_CONTEXT = 500 * 10**6
"""Bytes of a GPU that torch's own kernels and libraries take, about."""
CPU_LIBRARIES = 120 * 10**6
"""Bytes that libraries take on a CPU once a run has begun: convolutions compiled for a few image sizes, and what is
imported late; as measured."""
HEADER = 20_000
"""Bytes of a checkpoint besides its tensors, about."""

_STATES = {"adam": 2, "lion": 1, "sgd": 0, "adafactor": 0, "adagrad": 1, "rmsprop": 1, "ademamix": 3}
"""Beginning of an optimizer's name -> how many numbers it keeps for each weight."""


@dataclass(frozen=True)
class Sharding:
    """How a launch divides what it holds.

    Attributes:
        processes: Ranks that train together.
        stage: Stage of ZeRO; 0 without DeepSpeed.
        offload: Whether the optimizer's state, and with stage 3 the denoiser's weights, lie in the CPU's memory.
    """

    processes: int = 1
    stage: int = 0
    offload: bool = False

    def share(self, stage: int) -> int:
        """Returns into how many parts something is divided from `stage` on."""
        return self.processes if self.stage >= stage else 1


@dataclass(frozen=True)
class Holdings:
    """What a run holds from its start to its end, in bytes, before it is divided.

    Attributes:
        frozen: Weights of the denoiser that are not trained.
        trained: Those that are.
        optimizer: What the optimizer keeps.
        average: The averaged weights.
        reference: The frozen copy of the denoiser.
        vae: The weights of VAE and further networks of the generator.
        judges: The weights of the rewards' networks.
        images: Pixels of datasets that are kept decoded.
        paged: Whether the optimizer's state may leave the GPU.
    """

    frozen: int
    trained: int
    optimizer: int
    average: int
    reference: int
    vae: int
    judges: int
    images: int
    paged: bool = False

    def divided(self, sharding: Sharding) -> dict[str, int]:
        """Returns what one process holds on its accelerator, by name."""
        away = sharding.offload and sharding.stage >= 1
        weights_away = sharding.offload and sharding.stage >= 3
        optimizer = 0 if away or self.paged else self.optimizer // sharding.share(1)
        parts = {
            "frozen weights of the denoiser": 0 if weights_away else self.frozen // sharding.share(3),
            "trained weights": 0 if weights_away else self.trained // sharding.share(3),
            "optimizer": optimizer,
            "averaged weights": self.average,
            "reference copy": self.reference,
            "VAE": self.vae,
            "judges": self.judges,
            "decoded photos": self.images,
        }
        if sharding.processes > 1 and sharding.stage == 0:
            parts["gradient buckets of DDP"] = self.trained
        if sharding.stage >= 1 and not away:
            # ZeRO steps on a flat copy of its own.
            parts["ZeRO's copy of the trained weights"] = self.trained // sharding.share(1)
        return {name: size for name, size in parts.items() if size}


@dataclass(frozen=True)
class Phase:
    """One thing a run does.

    Attributes:
        name: What.
        peak: The most that it takes above what is held.
        also: Further bytes that are held while it lasts.
    """

    name: str
    peak: Peak
    also: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes above what is held from start to end."""
        return self.peak.size + sum(self.also.values())


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        holdings: What it holds all the time.
        phases: What it takes besides, at different times.
        gradients: Bytes of the gradients, which are part of the update.
        work: What one update computes.
        checkpoint: Bytes of a checkpoint.
        saved: Bytes of the saved generator.
        on_cpu: Whether it is the CPU's memory.
    """

    holdings: Holdings
    phases: Sequence[Phase]
    gradients: int
    work: Work
    checkpoint: int
    saved: int
    on_cpu: bool

    def peak(self, sharding: Sharding) -> tuple[int, Phase]:
        """Returns the most bytes that are in use by one process at a time, and when; without what libraries take."""
        held = sum(self.holdings.divided(sharding).values())
        sizes = [(held + phase.size - self._spared(phase, sharding), phase) for phase in self.phases]
        return max(sizes, key=lambda pair: pair[0])

    def parts(self, sharding: Sharding) -> dict[str, int]:
        """Returns what one process takes of its device, by what takes it, the largest first."""
        _, phase = self.peak(sharding)
        parts = {**self.holdings.divided(sharding), **phase.also}
        for name, size in phase.peak.parts.items():
            parts[f"{name}, while in use" if name in parts else name] = size
        if spared := self._spared(phase, sharding):
            parts["gradients on other ranks"] = -spared
        if self.on_cpu:
            parts["libraries"] = CPU_LIBRARIES
            # Small blocks (up to `MAPPED`) stay with the process when they are freed, and those of an evaluation leave
            # gaps that those of an update do not fit into: both add up. The last phase is the evaluation once more.
            small = sum(phase.peak.small for phase in self.phases if phase.name != LAST)
            large = max(phase.peak.large for phase in self.phases)
            parts["freed, but kept by the C library"] = max(0, small + large - phase.peak.size)
        else:
            parts["CUDA"] = CUDA_CONTEXT
        return {name: size for name, size in sorted(parts.items(), key=lambda item: -item[1]) if size}

    def total(self, sharding: Sharding) -> int:
        """Returns the bytes that one process takes of its device: on a CPU, above what it holds after its imports."""
        return sum(self.parts(sharding).values())

    def _spared(self, phase: Phase, sharding: Sharding) -> int:
        if phase.name != UPDATE:
            return 0
        return self.gradients - self.gradients // sharding.share(2)


UPDATE = "update"
EVALUATION = "evaluation"
LAST = "measuring the saved generator"


def rehearse(
    trainer: AlignmentTrainer,
    mode: FakeTensorMode,
    *,
    crop_size: int,
    evaluated: tuple[int, int] | None,
    judges: Mapping[str, nn.Module],
    images: int = 0,
    measured: bool = True,
    cpu: bool = True,
) -> Estimate:
    """Lets a trainer whose networks have no content take one update and evaluate one image.

    Args:
        trainer: The trainer, on the CPU.
        mode: Of its networks' tensors.
        crop_size: Side of the training crops in HR pixels.
        evaluated: Height and width of the largest evaluated image in HR pixels; None without evaluation.
        judges: The networks of the rewards by name.
        images: Bytes of datasets that are kept decoded.
        measured: Whether the saved generator is opened beside the trainer and measured, as the commands do.
        cpu: Whether the run itself will be on a CPU.
    """
    generator, args = trainer.generator, trainer.args
    named = {name: network for name, network in _networks(generator).items() if name != "denoiser"}
    with (
        ShapeTrace(conv_buffers=cpu) as trace,
        trace.naming({"denoiser": generator.denoiser, **_vae_parts(generator), **judges}),
    ):
        gradients, buffered = _update(
            trainer, _batch(mode, args.per_device_train_batch_size, crop_size, crop_size, trainer)
        )
    phases = [Phase(UPDATE, trace.peak, {"rollouts that wait": buffered} if buffered else {})]
    weights = {name: _bytes(network.parameters()) for name, network in _networks(generator).items()}
    trained = _bytes(trainer.generator_parameters())
    if evaluated is not None:
        seen = _evaluation(trainer, _batch(mode, 1, *evaluated, trainer), {**_vae_parts(generator), **judges}, cpu)
        also = {"weights while the average is evaluated": trained} if trainer.average is not None else {}
        phases.append(Phase(EVALUATION, seen, also))
        if measured:
            phases.append(Phase(LAST, seen, {"the generator once more": sum(weights.values())}))
    reference = generator.reference_model()
    holdings = Holdings(
        frozen=max(0, weights["denoiser"] - trained) if trained <= weights["denoiser"] else 0,
        trained=trained,
        optimizer=optimizer_bytes(str(args.optim), trainer.generator_parameters()),
        average=0 if trainer.average is None else sum(p.numel() * FLOAT32 for p in trainer.generator_parameters()),
        reference=0 if reference is None else _bytes(reference.parameters()),
        vae=sum(_bytes(network.parameters()) for network in named.values()),
        judges=_bytes(parameter for network in judges.values() for parameter in network.parameters()),
        images=images if cpu else 0,
        paged="paged" in str(args.optim) and not cpu,
    )
    return Estimate(
        holdings,
        phases,
        gradients,
        trace.work,
        checkpoint=trained + holdings.optimizer + holdings.average + buffered + HEADER,
        saved=sum(weights.values()) + HEADER,
        on_cpu=cpu,
    )


def optimizer_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """Returns the size of an optimizer's state, by its name in `TrainingArguments.optim`."""
    plain = name.replace("OptimizerNames.", "").lower().removeprefix("paged_")
    numbers = next((count for start, count in _STATES.items() if plain.startswith(start)), 2)
    total = 0
    for parameter in parameters:
        short = "8bit" in plain and parameter.numel() >= LEAST_8BIT
        total += numbers * parameter.numel() * (1 if short else FLOAT32)
    return total


@dataclass(frozen=True)
class Rates:
    """What a device computes in a second, as measured: operations of convolutions, of matrix products, and bytes."""

    convolution: float
    matrix: float
    traffic: float
    start: float

    def seconds(self, work: Work) -> float:
        """Returns about how long a piece of work takes."""
        return (
            work.convolution / self.convolution
            + work.matrix / self.matrix
            + work.traffic / self.traffic
            + work.operations * self.start
        )


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """Measures this device for about a second."""
    size = 64 if device.type == "cpu" else 256
    image = torch.randn(2, 64, size, size, device=device, dtype=dtype)
    kernel = torch.randn(64, 64, 3, 3, device=device, dtype=dtype)
    matrix = torch.randn(512 * size // 64, 512 * size // 64, device=device, dtype=dtype)
    large = torch.randn(2**22, device=device)
    small = torch.randn(8, device=device)
    convolution = 2 * image.numel() * 64 * 9 / _timed(lambda: torch.conv2d(image, kernel, padding=1), device)
    product = 2 * len(matrix) ** 3 / _timed(lambda: matrix @ matrix, device)
    traffic = 2 * large.numel() * FLOAT32 / _timed(lambda: large * 2, device)
    return Rates(convolution, product, traffic, _timed(lambda: small * 2, device))


def _timed(run: Any, device: torch.device, budget: float = 0.2) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < budget:
        run()
        count += 1
    wait()
    return (time.perf_counter() - began) / count


def _update(trainer: AlignmentTrainer, batch: dict[str, Any]) -> tuple[int, int]:
    """Takes the micro-batches of one update that differ in memory; returns the bytes of the gradients, and of the
    rollouts that wait while others are computed."""
    model, accumulation = trainer.model, trainer.args.gradient_accumulation_steps
    model.train()
    if trainer.args.activation_checkpointing:
        model.activation_checkpointing_enable()
    prepared = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    buffered = 0
    for _ in range(min(accumulation, 2)):
        if isinstance(trainer, SRDDPOTrainer):
            (rolled,) = trainer._roll_out([dict(batch)])
            waiting = _bytes(value for value in rolled.values() if isinstance(value, Tensor))
            buffered = (accumulation - 1) * waiting
        else:
            rolled = trainer._prepare_inputs(dict(batch))
        loss = trainer.objective(prepared, rolled).loss / accumulation
        with _trace().labelled("gradients and what the backward pass needs"):
            loss.backward()
        del loss, rolled
    found = [parameter.grad for parameter in trainer.generator_parameters() if parameter.grad is not None]
    return _bytes(found), buffered


def _trace() -> ShapeTrace:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    (trace,) = (mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, ShapeTrace))
    return trace


@torch.no_grad()
def _evaluation(trainer: AlignmentTrainer, batch: dict[str, Any], names: Mapping[str, nn.Module], cpu: bool) -> Peak:
    denoiser = trainer.generator.denoiser
    with (
        eval_mode(trainer.model),
        ShapeTrace(conv_buffers=cpu) as trace,
        trace.naming({"denoiser": denoiser, **names}),
    ):
        trainer.evaluate_batch(trainer.model, trainer._images_to_float(batch))
    return trace.peak


def _batch(mode: FakeTensorMode, count: int, height: int, width: int, trainer: AlignmentTrainer) -> dict[str, Any]:
    scale = trainer.generator.scale
    lr, hr = ((count, 3, height // scale, width // scale), (count, 3, height, width))
    with mode:
        images = {name: torch.empty(shape, dtype=torch.uint8) for name, shape in (("lr_image", lr), ("hr_image", hr))}
    return {**images, "sample_id": [f"image {number}" for number in range(count)]}


def _networks(generator: Generator) -> dict[str, nn.Module]:
    """Returns the networks that a generator consists of."""
    found = {"denoiser": generator.denoiser}
    for name in ("vae", "pixel_denoiser"):
        network = getattr(generator, name, None)
        if network is not None:
            found[name] = network
    return found


def _vae_parts(generator: Generator) -> dict[str, nn.Module]:
    vae = getattr(generator, "vae", None)
    return {} if vae is None else {"encoder of the VAE": vae.encoder, "decoder of the VAE": vae.decoder}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

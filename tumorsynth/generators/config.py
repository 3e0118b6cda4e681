"""The ``config`` of a generator's card: its sampler, its networks, and limits on both.

Cards come from strangers. Hashes detect damage, but whoever changes a folder can change these too,
so limits keep a config from using unbounded memory or time.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tumorsynth.appearance.contrast import ContrastConfig
from tumorsynth.generators.sampling import Prediction
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.models.conv_unet import ConvUNet, ConvUNetConfig
from tumorsynth.models.unet import FactorizedUNet, UNetConfig

DENOISERS: dict[str, tuple[type[Any], type[Any]]] = {
    "factorized": (FactorizedUNet, UNetConfig),
    "conv": (ConvUNet, ConvUNetConfig),
}
MAX_STEPS = 1000
MAX_CROP_SIDE = 192  # voxels
MAX_LIST_ENTRIES = 64  # also the most blocks at one width
MAX_INTEGER = 65536  # channels, codes, timesteps
MAX_MAGNITUDE = 1e5  # of HU and other real numbers


@dataclass(frozen=True)
class SamplerConfig:
    """How a generator samples, and which crops it takes.

    Args:
        method: "ddpm" (early tumours, 4 timesteps) or "ddim" (mid and late, 200 timesteps in 50
            steps).
        timesteps: length of the cosine schedule.
        steps: denoising steps: at most ``timesteps`` for DDPM, a divisor of it for DDIM. The
            fewer, the faster; docs/performance.md has what it changes.
        prediction: what the denoiser predicts, "noise" (published), "x0" or "v".
        clamp: x0 is clamped to [-clamp, clamp] at every step; None does not clamp (published DDIM).
        mask_conditioning: how the mask comes to latent size, "nearest" (published) or "area", which
            keeps tiny tumours.
        zero_terminal_snr: whether the last noise level holds no signal (Lin et al. 2023). Needs
            prediction "x0" or "v".
        contrast: contrasts that the denoiser was trained with, given to it as a further channel of
            cond; None for denoisers without that channel (published).
        crop_size: smallest side of a crop, in voxels of 1 mm.
        crop_multiple: sides of crops are multiples of this.

    Raises:
        ValueError: if a value is out of range or two do not fit together.
    """

    method: str = "ddpm"
    timesteps: int = 4
    steps: int = 4
    prediction: Prediction = "noise"
    clamp: float | None = 1.0
    mask_conditioning: str = "nearest"
    zero_terminal_snr: bool = False
    contrast: ContrastConfig | None = None
    crop_size: int = 96
    crop_multiple: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.contrast, dict):  # from JSON
            object.__setattr__(self, "contrast", ContrastConfig(**self.contrast))
        counts = (self.timesteps, self.steps, self.crop_size, self.crop_multiple)
        rules = {
            f"timesteps and steps must be whole numbers, at most {MAX_STEPS}, crop_size and "
            f"crop_multiple at most {MAX_CROP_SIDE}": _are_integers(*counts)
            and max(counts[:2]) <= MAX_STEPS
            and max(counts[2:]) <= MAX_CROP_SIDE,
            "clamp must be positive, or None": self.clamp is None
            or (_is_finite(self.clamp) and self.clamp > 0),
            'zero_terminal_snr needs prediction "x0" or "v"': not (
                self.zero_terminal_snr and self.prediction == "noise"
            ),
            'method must be "ddpm" or "ddim"': self.method in ("ddpm", "ddim"),
            'prediction must be "noise", "x0" or "v"': self.prediction in ("noise", "x0", "v"),
            'mask_conditioning must be "nearest" or "area"': self.mask_conditioning
            in ("nearest", "area"),
            "steps must be at most timesteps for ddpm, a divisor of it for ddim": 0 < self.steps
            and (
                self.steps <= self.timesteps
                if self.method == "ddpm"
                else self.timesteps % self.steps == 0
            ),
            "crop_size must be a positive multiple of crop_multiple": self.crop_multiple > 0
            and self.crop_size > 0
            and self.crop_size % self.crop_multiple == 0,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{rule}, got {asdict(self)}")


@torch.random.fork_rng(devices=[])  # initial weights must not advance the caller's random stream
def build(config: dict[str, Any]) -> tuple[Autoencoder, nn.Module, SamplerConfig]:
    """Build untrained networks and the sampler from the ``config`` of a card.

    Args:
        config: a dict with ``autoencoder``, ``denoiser`` (with its ``type``) and ``sampler``.

    Returns:
        Autoencoder, denoiser and sampler.

    Raises:
        ValueError: for an unknown denoiser or field, for sizes beyond the limits, and for parts
            that do not fit together.
    """
    if isinstance(config, dict) and "autoencoder" in config and "denoiser" not in config:
        raise ValueError(
            "a generator must have a denoiser, but this folder holds an autoencoder alone; train "
            "one: tumorsynth train denoiser DATA -o OUT --autoencoder FOLDER"
        )
    try:
        check_bounds(config)
        denoiser_config = dict(config["denoiser"])
        kind = denoiser_config.pop("type")
        network, network_config = DENOISERS[kind]
        sizes = network_config(**denoiser_config)
        autoencoder = Autoencoder(AutoencoderConfig(**config["autoencoder"]))
        sampler = SamplerConfig(**config["sampler"])
        _check_fit(autoencoder.config, {"type": kind, **asdict(sizes)}, sampler)
        return autoencoder, network(sizes), sampler
    except Exception as error:  # of many types: torch's own where a size is absurd
        raise ValueError(
            f"the card's config does not describe a generator of this version: {error}; "
            f"it needs autoencoder, denoiser (type {' or '.join(DENOISERS)}) and sampler"
        ) from error


def config_of(
    autoencoder: Autoencoder, denoiser: nn.Module, sampler: SamplerConfig
) -> dict[str, Any]:
    """Describe networks and sampler as a JSON-able dict, the inverse of `build`.

    Raises:
        TypeError: if the denoiser is not one of `DENOISERS`.
    """
    for kind, (network, _) in DENOISERS.items():
        if type(denoiser) is network:
            return {
                "autoencoder": asdict(autoencoder.config),
                "denoiser": {"type": kind, **asdict(denoiser.config)},  # type: ignore[call-overload]
                "sampler": asdict(sampler),
            }
    raise TypeError(
        f"a generator to save needs a denoiser of type {' or '.join(DENOISERS)}, got "
        f"{type(denoiser).__name__}"
    )


def check_bounds(value: Any, name: str = "config") -> None:
    """Raise ValueError if a number in a config is not finite or larger than any generator needs.

    Args:
        value: a dict, list, number or anything else from JSON; dicts and lists are searched.
        name: name of the value in the error.
    """
    if isinstance(value, dict):
        for key, entry in value.items():
            check_bounds(entry, str(key)[:40])
    elif isinstance(value, (list, tuple)):
        if len(value) > MAX_LIST_ENTRIES:
            raise ValueError(
                f"{name} must have at most {MAX_LIST_ENTRIES} entries, got {len(value)}"
            )
        for entry in value:
            check_bounds(entry, name)
    elif isinstance(value, int):
        most = MAX_LIST_ENTRIES if name.endswith("blocks") or name == "patch" else MAX_INTEGER
        if not -MAX_MAGNITUDE <= value <= most:
            raise ValueError(f"{name} must be at most {most}, got {str(value)[:40]}")
    elif isinstance(value, float) and not abs(value) <= MAX_MAGNITUDE:
        raise ValueError(f"{name} must be a finite number, at most {MAX_MAGNITUDE:g}, got {value}")


def _check_fit(
    autoencoder: AutoencoderConfig, denoiser: dict[str, Any], sampler: SamplerConfig
) -> None:
    """Raise ValueError for parts that would otherwise only fail during a call."""
    latent = autoencoder.latent_channels
    expected = (latent, latent + 1 + (sampler.contrast is not None))
    if denoiser["type"] == "conv":
        found = (denoiser["latent_channels"], denoiser["cond_channels"])
        halvings = len(denoiser["widths"]) - 1
    else:
        out = denoiser["out_channels"]
        found = (out, denoiser["in_channels"] - out)
        halvings = len(denoiser["multipliers"]) - 1
    if found != expected:
        raise ValueError(
            f"the denoiser must take {expected[0]} channels of latent and {expected[1]} of "
            f"conditioning, as the autoencoder and the sampler say, got {found[0]} and {found[1]}"
        )
    multiple = autoencoder.factor * 2**halvings
    if sampler.crop_multiple % multiple:
        raise ValueError(
            f"crop_multiple must be a multiple of {multiple}, by which the networks make a crop "
            f"smaller, got {sampler.crop_multiple}"
        )


def _are_integers(*numbers: Any) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)


def _is_finite(*numbers: Any) -> bool:
    return all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)

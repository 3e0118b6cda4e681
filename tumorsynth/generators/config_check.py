"""What a card's config may ask for. Cards come from others: none may take memory without end.

A model's hash is in its card and a config's too, but whoever changes a folder can change these with
it, so that what is built from a config is bounded by rules, and by the tensors that come with it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tumorsynth.generators.diffusion import SamplerConfig
    from tumorsynth.models.autoencoder import AutoencoderConfig

MAX_LAYERS = 64  # entries of a list, and blocks at one width
MAX_SIZE = 65536  # any other whole number: channels, codes, steps
MAX_NUMBER = 1e5  # of either sign: HU, time


def check_bounds(value: Any, name: str = "config") -> None:
    """ValueError where a number is not finite or beyond what any generator needs."""
    if isinstance(value, dict):
        for key, entry in value.items():
            check_bounds(entry, str(key)[:40])
    elif isinstance(value, (list, tuple)):
        if len(value) > MAX_LAYERS:
            raise ValueError(f"{name} must have at most {MAX_LAYERS} entries, got {len(value)}")
        for entry in value:
            check_bounds(entry, name)
    elif isinstance(value, int):
        most = MAX_LAYERS if name.endswith("blocks") or name == "patch" else MAX_SIZE
        if not -MAX_NUMBER <= value <= most:
            raise ValueError(f"{name} must be at most {most}, got {str(value)[:40]}")
    elif isinstance(value, float) and not abs(value) <= MAX_NUMBER:
        raise ValueError(f"{name} must be a finite number, at most {MAX_NUMBER:g}, got {value}")


def check_fit(
    autoencoder: AutoencoderConfig, denoiser: dict[str, Any], sampler: SamplerConfig
) -> None:
    """ValueError where the parts would only fail in the middle of a call."""
    latent = autoencoder.latent_channels
    cond = latent + 1 + (sampler.contrast is not None)
    wanted = (latent, cond)
    if denoiser["type"] == "conv":
        found = (denoiser["latent_channels"], denoiser["cond_channels"])
        halvings = len(denoiser["widths"]) - 1
    else:
        out = denoiser["out_channels"]
        found = (out, denoiser["in_channels"] - out)
        halvings = len(denoiser["multipliers"]) - 1
    if found != wanted:
        raise ValueError(
            f"the denoiser must take {wanted[0]} channels of latent and {wanted[1]} of "
            f"conditioning, as the autoencoder and the sampler say, got {found[0]} and {found[1]}"
        )
    multiple = autoencoder.factor * 2**halvings
    if sampler.crop_multiple % multiple:
        raise ValueError(
            f"crop_multiple must be a multiple of {multiple}, by which the networks make a crop "
            f"smaller, got {sampler.crop_multiple}"
        )


def whole(*numbers: Any) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)


def finite(*numbers: Any) -> bool:
    return all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)

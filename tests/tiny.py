"""A diffusion generator small enough for tests, with random weights."""

from __future__ import annotations

from typing import Any

import torch

from tumorsynth.generators.config import SamplerConfig
from tumorsynth.generators.diffusion import Generator
from tumorsynth.intensity import HU_HIGH, HU_LOW
from tumorsynth.models.autoencoder import Autoencoder, AutoencoderConfig
from tumorsynth.models.conv_unet import ConvUNet, ConvUNetConfig


def tiny_generator(
    seed: int = 0,
    codes: int = 0,
    window: tuple[float, float] = (HU_LOW, HU_HIGH),
    **sampler: Any,
) -> Generator:
    """Return a generator with crop_size 32 and crop_multiple 8, unless given."""
    sampler = {"crop_size": 32, "crop_multiple": 8, **sampler}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = Autoencoder(
            AutoencoderConfig(
                patch=2,
                encoder_widths=(8, 16),
                decoder_widths=(16, 8),
                decoder_blocks=1,
                codes=codes,
                groups=4,
                padding="zeros",
                window=window,
            )
        )
        contrast_channels = int(sampler.get("contrast") is not None)
        cond_channels = 9 + contrast_channels
        sizes = ConvUNetConfig((8, 16), 1, cond_channels=cond_channels, time_channels=16, groups=4)
        denoiser = ConvUNet(sizes)
        for p in denoiser.parameters():  # some start at 0, which would hide the mask and the step
            torch.nn.init.normal_(p, std=0.15)
    return Generator(autoencoder, denoiser, SamplerConfig(**sampler), {"name": f"tiny-{seed}"})


def tiny_crop(batch: int = 1, side: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A crop in [0, 1] and a ball of 5 mm radius in it, (B, 1, side, side, side)."""
    rng = torch.Generator().manual_seed(seed)
    crop = 0.65 + 0.05 * torch.randn(batch, 1, side, side, side, generator=rng)
    far = sum(
        g.square() for g in torch.meshgrid(*[torch.arange(side) - side // 2] * 3, indexing="ij")
    )
    return crop.clamp(0, 1), (far <= 25).expand(batch, 1, -1, -1, -1)

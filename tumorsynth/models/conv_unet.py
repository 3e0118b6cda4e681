"""A small 3-D convolutional U-Net denoiser, for generators trained with this package."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tumorsynth.models.conv import Conv3d, ConvTranspose3d, GroupNorm, cpu_layout


@dataclass(frozen=True)
class ConvUNetConfig:
    """Sizes of a `ConvUNet`.

    Args:
        widths: channels of each level; every level after the first halves the size.
        blocks: residual blocks of each level, on the way down and up.
        latent_channels: channels of the latent.
        cond_channels: channels of the conditioning.
        time_channels: channels of the time embedding.
        groups: groups of every GroupNorm.
    """

    widths: tuple[int, ...] = (64, 128)
    blocks: int = 2
    latent_channels: int = 8
    cond_channels: int = 9
    time_channels: int = 64
    groups: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))


class Block(nn.Module):
    """GroupNorm, SiLU, 3x3x3 convolution, twice, plus the input; time scales and shifts between."""

    def __init__(self, inputs: int, width: int, config: ConvUNetConfig):
        super().__init__()
        self.norm1 = GroupNorm(config.groups, inputs)
        self.conv1 = Conv3d(inputs, width, 3, padding=1)
        self.time = nn.Linear(config.time_channels, 2 * width)
        self.norm2 = GroupNorm(config.groups, width)
        self.conv2 = Conv3d(width, width, 3, padding=1)
        self.skip = Conv3d(inputs, width, 1) if inputs != width else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(time)[:, :, None, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class ConvUNet(nn.Module):
    """Predicts noise, x0 or v from a noisy latent, the step and the conditioning.

    Args:
        config: sizes.
    """

    def __init__(self, config: ConvUNetConfig = ConvUNetConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = c = config
        widths = c.widths
        self.time = nn.Sequential(
            nn.Linear(c.time_channels, c.time_channels),
            nn.SiLU(),
            nn.Linear(c.time_channels, c.time_channels),
            nn.SiLU(),
        )
        self.stem = Conv3d(c.latent_channels + c.cond_channels, widths[0], 3, padding=1)
        self.downs = nn.ModuleList()
        self.shrinks = nn.ModuleList()
        for level, width in enumerate(widths):
            self.downs.append(nn.ModuleList(Block(width, width, c) for _ in range(c.blocks)))
            if level + 1 < len(widths):
                self.shrinks.append(Conv3d(width, widths[level + 1], 2, stride=2))
        self.grows = nn.ModuleList()
        self.ups = nn.ModuleList()
        for wide, width in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.grows.append(ConvTranspose3d(wide, width, 2, stride=2))
            self.ups.append(
                nn.ModuleList(
                    Block(width * (2 if i == 0 else 1), width, c) for i in range(c.blocks)
                )
            )
        self.norm = GroupNorm(c.groups, widths[0])
        self.head = Conv3d(widths[0], c.latent_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Return the prediction, (B, 8, d, h, w).

        Args:
            x_t: noisy latent, (B, 8, d, h, w); sides are multiples of 2 ** (levels - 1).
            t: step of each sample, (B,) integers.
            cond: (B, 9, d, h, w), the latent of the hollowed crop and the mask.

        Raises:
            ValueError: if a side does not fit.
        """
        multiple = 2 ** len(self.shrinks)
        if any(side % multiple for side in x_t.shape[2:]):
            raise ValueError(
                f"d, h and w of a latent must be multiples of {multiple}, got "
                f"{tuple(x_t.shape[2:])}; pass a crop whose sides fit"
            )
        time = self.time(_sinusoids(t, self.config.time_channels).to(x_t.dtype))
        x = self.stem(cpu_layout(torch.cat([x_t, cond], dim=1)))
        skips = []
        for level, blocks in enumerate(self.downs):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, time)
            if level < len(self.shrinks):
                skips.append(x)
                x = self.shrinks[level](x)
        for grow, blocks in zip(self.grows, self.ups, strict=True):
            x = torch.cat([grow(x), skips.pop()], dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, time)
        return self.head(F.silu(self.norm(x)))


def _sinusoids(t: Tensor, channels: int) -> Tensor:
    """Embed integer steps (B,) as sines and cosines (B, channels)."""
    half = channels // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * 10 * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)

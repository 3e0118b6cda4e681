"""The factorised denoiser: a 3-D U-Net with separate space and depth (Ho et al. 2022, section 3).

Convolutions and spatial attention work within slices, depth attention across them; depth is never
downsampled. The default configuration has the layer sizes of the published DiffTumor denoiser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tumorsynth.models.attention import (
    DepthAttention,
    RelativePositionBias,
    Rotary,
    SpatialAttention,
    SpatialLinearAttention,
)
from tumorsynth.models.conv import Conv3d, ConvTranspose3d, GroupNorm, cpu_layout

TIME_BASE = 10000.0  # of the frequencies in the time embedding


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a `FactorizedUNet`; the defaults are the published ones.

    Args:
        dim: channels at full resolution.
        multipliers: channels of each level, as multiples of ``dim``.
        in_channels: channels of the noisy latent and the conditioning together.
        out_channels: channels of the latent.
        heads: heads of every attention.
        head_dim: channels of a head.
        groups: groups of every GroupNorm.
        rotary_dim: channels of a head that the rotary embedding rotates.
        buckets: buckets of the relative position bias in depth attention.
        max_distance: largest distance of that bias, in slices.

    Raises:
        ValueError: if a size is out of range or two do not fit together.
    """

    dim: int = 24
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    in_channels: int = 17
    out_channels: int = 8
    heads: int = 8
    head_dim: int = 32
    groups: int = 8
    rotary_dim: int = 32
    buckets: int = 32
    max_distance: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))  # a card holds a list
        if self.dim % self.groups or self.dim % 2 or self.dim < 4:
            raise ValueError(
                f"dim must be even, at least 4 and a multiple of groups={self.groups}, "
                f"got {self.dim}; pass for example dim={self.groups * 4}"
            )
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"multipliers must be one positive integer per level, got {self.multipliers}; "
                "pass for example (1, 2, 4, 8)"
            )
        if self.in_channels <= self.out_channels:
            raise ValueError(
                f"in_channels must exceed out_channels={self.out_channels} by the conditioning's "
                f"channels, got {self.in_channels}; pass latent channels + conditioning channels"
            )
        if self.rotary_dim % 2 or self.head_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                "head_dim and rotary_dim must be even and rotary_dim at most head_dim, "
                f"got {self.head_dim} and {self.rotary_dim}; pass rotary_dim=head_dim=32"
            )
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                "buckets must be a positive multiple of 4 and max_distance more than buckets / 4, "
                f"got {self.buckets} and {self.max_distance}; pass 32 and 32"
            )

    @property
    def time_dim(self) -> int:
        return 4 * self.dim

    @property
    def cond_channels(self) -> int:
        return self.in_channels - self.out_channels

    @property
    def size_multiple(self) -> int:
        """Height and width of a latent are multiples of this."""
        return int(2 ** (len(self.multipliers) - 1))


class TimeEmbedding(nn.Module):
    """Embed integer steps t (B,) as (B, time_dim): sines and cosines, Linear, GELU, Linear."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.waves = config.dim // 2
        self.linear1 = nn.Linear(config.dim, config.time_dim)
        self.linear2 = nn.Linear(config.time_dim, config.time_dim)

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(self.waves, device=t.device, dtype=torch.float32) / (self.waves - 1)
        angles = t.float()[:, None] * torch.exp(-math.log(TIME_BASE) * steps)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.linear1.weight.dtype)
        return self.linear2(F.gelu(self.linear1(waves)))


def slice_conv(dim_in: int, dim_out: int, kernel: int) -> Conv3d:
    """Return a 2-D convolution for every slice, padded with zeros to keep its size."""
    return Conv3d(dim_in, dim_out, (1, kernel, kernel), padding=(0, kernel // 2, kernel // 2))


class ResidualBlock(nn.Module):
    """conv, norm, scale and shift by time, SiLU; conv, norm, SiLU; plus the input.

    Args:
        dim_in: channels of the input.
        dim_out: channels of the output.
        groups: groups of the GroupNorms.
        time_dim: channels of the time embedding; 0 makes a block without one.
    """

    def __init__(self, dim_in: int, dim_out: int, groups: int, time_dim: int) -> None:
        super().__init__()
        self.time = nn.Linear(time_dim, 2 * dim_out) if time_dim else None
        self.conv1 = slice_conv(dim_in, dim_out, 3)
        self.norm1 = GroupNorm(groups, dim_out)
        self.conv2 = slice_conv(dim_out, dim_out, 3)
        self.norm2 = GroupNorm(groups, dim_out)
        self.skip = slice_conv(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.norm1(self.conv1(x))
        if self.time is not None and emb is not None:
            scale, shift = self.time(F.silu(emb))[:, :, None, None, None].chunk(2, dim=1)
            h = h * (scale + 1) + shift
        h = F.silu(self.norm2(self.conv2(F.silu(h))))
        return h + self.skip(x)


class Level(nn.Module):
    """Two residual blocks, spatial linear attention, depth attention."""

    def __init__(self, dim_in: int, dim_out: int, config: UNetConfig) -> None:
        super().__init__()
        self.res1 = ResidualBlock(dim_in, dim_out, config.groups, config.time_dim)
        self.res2 = ResidualBlock(dim_out, dim_out, config.groups, config.time_dim)
        self.spatial = SpatialLinearAttention(dim_out, config.heads, config.head_dim)
        self.depth = DepthAttention(dim_out, config.heads, config.head_dim)

    def forward(self, x: Tensor, emb: Tensor, bias: Tensor, table: Tensor) -> Tensor:
        x = self.res2(self.res1(x, emb), emb)
        return self.depth(self.spatial(x), bias, table)


class Middle(nn.Module):
    """The lowest level: full spatial attention between two residual blocks."""

    def __init__(self, dim: int, config: UNetConfig) -> None:
        super().__init__()
        self.res1 = ResidualBlock(dim, dim, config.groups, config.time_dim)
        self.spatial = SpatialAttention(dim, config.heads, config.head_dim)
        self.depth = DepthAttention(dim, config.heads, config.head_dim)
        self.res2 = ResidualBlock(dim, dim, config.groups, config.time_dim)

    def forward(self, x: Tensor, emb: Tensor, bias: Tensor, table: Tensor) -> Tensor:
        x = self.spatial(self.res1(x, emb))
        return self.res2(self.depth(x, bias, table), emb)


class FactorizedUNet(nn.Module):
    """Predicts noise, x0 or v from a noisy latent, the step and the conditioning.

    Args:
        config: sizes; None takes the published ones.
    """

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        widths = [config.dim * m for m in config.multipliers]
        inputs = [config.dim, *widths[:-1]]

        self.first = slice_conv(config.in_channels, config.dim, 7)
        self.first_depth = DepthAttention(config.dim, config.heads, config.head_dim)
        self.time = TimeEmbedding(config)
        self.rotary = Rotary(config.rotary_dim)
        self.bias = RelativePositionBias(config.buckets, config.heads, config.max_distance)

        self.downs = nn.ModuleList(
            Level(dim_in, dim_out, config) for dim_in, dim_out in zip(inputs, widths, strict=True)
        )
        self.shrink = nn.ModuleList(
            Conv3d(w, w, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1)) for w in widths[:-1]
        )
        self.middle = Middle(widths[-1], config)
        self.ups = nn.ModuleList(
            Level(2 * dim_out, dim_in, config)
            for dim_in, dim_out in zip(inputs[::-1], widths[::-1], strict=True)
        )
        self.grow = nn.ModuleList(
            ConvTranspose3d(w, w, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))
            for w in inputs[:0:-1]
        )
        self.last_res = ResidualBlock(2 * config.dim, config.dim, config.groups, time_dim=0)
        self.last = slice_conv(config.dim, config.out_channels, 1)

    def forward(self, x_t: Tensor, t: int | Tensor, cond: Tensor) -> Tensor:
        """Return the prediction, (B, 8, d, h, w).

        Args:
            x_t: noisy latent, (B, 8, d, h, w); h and w multiples of ``config.size_multiple``.
            t: step from 0 to T - 1, one int or (B,) integers.
            cond: (B, 9, d, h, w), the latent of the hollowed crop and the mask.

        Raises:
            ValueError: if shapes do not fit.
        """
        x, steps = self._checked(x_t, t, cond)
        emb = self.time(steps)
        bias, table = self.bias(x.shape[2]), self.rotary.table(x.shape[2])

        x = self.first(cpu_layout(x))
        outermost = x
        x = self.first_depth(x, bias, table)

        skips = []
        for i, level in enumerate(self.downs):
            x = level(x, emb, bias, table)
            skips.append(x)
            if i < len(self.shrink):
                x = self.shrink[i](x)

        x = self.middle(x, emb, bias, table)

        for i, level in enumerate(self.ups):
            x = level(torch.cat([x, skips.pop()], dim=1), emb, bias, table)
            if i < len(self.grow):
                x = self.grow[i](x)

        return self.last(self.last_res(torch.cat([x, outermost], dim=1)))

    def _checked(self, x_t: Tensor, t: int | Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Check the input; return it as (B, in_channels, d, h, w), and the steps as (B,)."""
        config = self.config
        expected = (x_t.shape[0], config.cond_channels, *x_t.shape[2:])
        if x_t.ndim != 5 or x_t.shape[1] != config.out_channels or cond.shape != expected:
            raise ValueError(
                f"x_t must be (B, {config.out_channels}, d, h, w) and cond "
                f"(B, {config.cond_channels}, d, h, w) of the same B, d, h, w, "
                f"got {tuple(x_t.shape)} and {tuple(cond.shape)}; pass latents of one size"
            )
        if any(side % config.size_multiple for side in x_t.shape[3:]):
            raise ValueError(
                f"h and w of a latent must be multiples of {config.size_multiple}, "
                f"got {tuple(x_t.shape[3:])}; pass a crop whose sides fit"
            )
        steps = torch.as_tensor(t, device=x_t.device)
        if steps.is_floating_point() or steps.shape not in ((), (1,), x_t.shape[:1]):
            raise ValueError(
                f"t must be one integer, or one per sample ({x_t.shape[0]}), "
                f"got {tuple(steps.shape)} of {steps.dtype}; pass t=0 .. T - 1"
            )
        return torch.cat([x_t, cond], dim=1), steps.expand(x_t.shape[0])

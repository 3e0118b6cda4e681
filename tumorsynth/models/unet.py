"""The denoiser: a 3-D U-Net whose space and depth are treated apart (Ho et al. 2022, section 3).

Convolutions and spatial attention see one slice at a time, depth attention sees one column of
slices at a time; depth is never downsampled. The default configuration has the layer sizes of the
published DiffTumor denoiser (6.0 M parameters).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tumorsynth.models.conv import (
    Conv3d,
    ConvTranspose3d,
    GroupNorm,
    Linear,
    cpu_autocast,
    cpu_layout,
)

CHUNK = 2**21  # bytes of q, k and v together, of the sequences that go together on a CPU
SHORT = 48  # tokens
ROTARY_BASE = 10000.0  # Su et al. 2021, section 3.2.2; the time embedding uses the same base


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a `FactorizedUNet`; the defaults are the published ones.

    in_channels counts the noisy latent (out_channels) and the conditioning together. heads,
    head_dim and rotary_dim describe every attention; buckets and max_distance (in slices) the
    relative position bias of depth attention.
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
        """Height and width of the latent must be multiples of this."""
        return int(2 ** (len(self.multipliers) - 1))


class TimeEmbedding(nn.Module):
    """Integer step t (B,) -> (B, time_dim): sines and cosines, Linear, GELU, Linear."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.waves = config.dim // 2
        self.linear1 = nn.Linear(config.dim, config.time_dim)
        self.linear2 = nn.Linear(config.time_dim, config.time_dim)

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(self.waves, device=t.device, dtype=torch.float32) / (self.waves - 1)
        angles = t.float()[:, None] * torch.exp(-math.log(ROTARY_BASE) * steps)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.linear1.weight.dtype)
        return self.linear2(F.gelu(self.linear1(waves)))


class Rotary(nn.Module):
    """Rotary position embedding over neighbouring channel pairs (Su et al. 2021, eq. 34)."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequencies = [ROTARY_BASE ** (-i / dim) for i in range(0, dim, 2)]
        self.register_buffer("frequencies", torch.tensor(frequencies))

    def table(self, length: int) -> Tensor:
        """(length, dim / 2, 2): cosine and sine of the turns of positions 0 .. length - 1."""
        positions = torch.arange(length, device=self.frequencies.device, dtype=torch.float32)
        angles = positions[:, None] * self.frequencies.float()
        if torch.compiler.is_compiling():  # torch's compiler makes no code for complex numbers
            return torch.stack([angles.cos(), angles.sin()], dim=-1)
        return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the first channels of x (..., length, channels) by a `Rotary.table`."""
    turned, rest = x.split([2 * len(table[0]), x.shape[-1] - 2 * len(table[0])], dim=-1)
    pairs = turned.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    turned = pairs.flatten(-2).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class RelativePositionBias(nn.Module):
    """Learned bias per head and bucketed distance (Raffel et al. 2020, section 2.1)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.max_distance = config.max_distance
        self.embedding = nn.Embedding(config.buckets, config.heads)

    def buckets(self, length: int, device: torch.device) -> Tensor:
        """(length, length) bucket of key j seen from query i.

        Half of the buckets is for keys before the query (and itself), half for those after it;
        in each, the first half holds one distance a bucket, the rest grow logarithmically.
        """
        per_side = self.embedding.num_embeddings // 2
        exact = per_side // 2
        position = torch.arange(length, device=device)
        offset = position[None, :] - position[:, None]
        distance = offset.abs()
        ratio = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (per_side - exact)).long()).clamp(max=per_side - 1)
        return torch.where(distance < exact, distance, far) + per_side * (offset > 0)

    def forward(self, length: int) -> Tensor:
        """(1, heads, length, length), to be added to the attention logits."""
        bias = self.embedding(self.buckets(length, self.embedding.weight.device))
        return rearrange(bias, "i j heads -> 1 heads i j").contiguous()


def by_parts(attend: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """attend(x) for sequences x (N, n, dim) that have nothing to do with one another.

    On a CPU a few at a time: what lies between, ``width`` numbers a token, then stays in its cache,
    instead of being as large as to be fresh memory from the system every time.
    """
    few = max(1, CHUNK // (x.shape[1] * width * (cpu_autocast() or x.dtype).itemsize))
    if x.device.type != "cpu" or torch.is_grad_enabled() or len(x) <= few:
        return attend(x)
    return torch.cat([attend(part) for part in x.split(few)])


def softmax(logits: Tensor, dim: int) -> Tensor:
    """In float32 at the least, as CUDA's autocast has it: on a CPU bfloat16 is slower, too."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(dim, dtype=wide).to(logits.dtype)


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention: q, k, v (B, heads, n, channels) and bias, added to the logits, -> as q.

    Short sequences on a CPU by plain matrix products: there PyTorch's fused attention, which is
    made for long ones, takes twice as long, four times in bfloat16.
    """
    heads, n, channels = q.shape[-3:]
    if q.device.type != "cpu" or torch.is_grad_enabled() or n > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    q, k, v = (part.reshape(-1, n, channels) for part in (q, k, v))
    logits = torch.bmm(q, k.transpose(1, 2)).unflatten(0, (-1, heads)).mul_(channels**-0.5)
    if bias is not None:
        logits += bias
    return torch.bmm(softmax(logits, -1).flatten(0, 1), v).unflatten(0, (-1, heads))


class Attention(nn.Module):
    """Softmax attention over tokens (N, n, dim), normalised before; returns the residual."""

    def __init__(self, dim: int, config: UNetConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.norm = nn.LayerNorm(dim, eps=1e-5, bias=False)
        self.to_qkv = Linear(dim, 3 * inner, bias=False)
        self.to_out = Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        return by_parts(lambda part: self._attend(part, bias, table), x, self.to_qkv.out_features)

    def _attend(self, x: Tensor, bias: Tensor | None, table: Tensor | None) -> Tensor:
        q, k, v = rearrange(
            self.to_qkv(self.norm(x)), "b n (qkv h c) -> qkv b h n c", qkv=3, h=self.heads
        )
        if table is not None:
            # The published model scales q before it rotates; a rotation is linear, so that
            # the scaling inside scaled_dot_product_attention gives the same logits.
            q, k = rotate(q, table), rotate(k, table)
        out = attended(q, k, v, None if bias is None else bias.to(q.dtype))
        return self.to_out(rearrange(out, "b h n c -> b n (h c)"))


class DepthAttention(Attention):
    """Attention along depth, each column of slices on its own: (B, dim, d, h, w) -> the same."""

    def forward(self, x: Tensor, bias: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        b, _, _, h, w = x.shape
        out = super().forward(rearrange(x, "b c d h w -> (b h w) d c"), bias, table)
        return x + rearrange(out, "(b h w) d c -> b c d h w", b=b, h=h, w=w)


class SpatialAttention(Attention):
    """Attention within each slice, without any position: (B, dim, d, h, w) -> the same."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        b, _, _, h, w = x.shape
        out = super().forward(rearrange(x, "b c d h w -> (b d) (h w) c"))
        return x + rearrange(out, "(b d) (h w) c -> b c d h w", b=b, h=h, w=w)


class SpatialLinearAttention(nn.Module):
    """Linear attention within each slice (Shen et al. 2021, eq. 3).

    q is normalised over channels, k over positions, so that k^T v is a small matrix per head and
    the cost grows with h w, not with its square.
    """

    def __init__(self, dim: int, config: UNetConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.scale = config.head_dim**-0.5
        self.norm = nn.LayerNorm(dim, eps=1e-5, bias=False)
        self.to_qkv = Linear(dim, 3 * inner, bias=False)
        self.to_out = Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, _, _, h, w = x.shape
        tokens = rearrange(x, "b c d h w -> (b d) (h w) c")
        out = by_parts(self._attend, tokens, self.to_qkv.out_features)
        return x + rearrange(out, "(b d) (h w) c -> b c d h w", b=b, h=h, w=w)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.to_qkv(self.norm(x)), "b n (qkv h c) -> qkv b h n c", qkv=3, h=self.heads
        )
        context = softmax(k, -2).transpose(-1, -2) @ v
        out = softmax(q, -1) @ (self.scale * context)
        return self.to_out(rearrange(out, "b h n c -> b n (h c)"))


def slice_conv(dim_in: int, dim_out: int, kernel: int) -> Conv3d:
    """A 2-D convolution applied to every slice, zeros around it."""
    return Conv3d(dim_in, dim_out, (1, kernel, kernel), padding=(0, kernel // 2, kernel // 2))


class ResidualBlock(nn.Module):
    """conv, norm, scale and shift by time, SiLU; conv, norm, SiLU; plus the input.

    time_dim 0 makes a block that takes no time embedding.
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
        self.spatial = SpatialLinearAttention(dim_out, config)
        self.depth = DepthAttention(dim_out, config)

    def forward(self, x: Tensor, emb: Tensor, bias: Tensor, table: Tensor) -> Tensor:
        x = self.res2(self.res1(x, emb), emb)
        return self.depth(self.spatial(x), bias, table)


class Middle(nn.Module):
    """The lowest level: full spatial attention between two residual blocks."""

    def __init__(self, dim: int, config: UNetConfig) -> None:
        super().__init__()
        self.res1 = ResidualBlock(dim, dim, config.groups, config.time_dim)
        self.spatial = SpatialAttention(dim, config)
        self.depth = DepthAttention(dim, config)
        self.res2 = ResidualBlock(dim, dim, config.groups, config.time_dim)

    def forward(self, x: Tensor, emb: Tensor, bias: Tensor, table: Tensor) -> Tensor:
        x = self.spatial(self.res1(x, emb))
        return self.res2(self.depth(x, bias, table), emb)


class FactorizedUNet(nn.Module):
    """Predicts the noise in x_t, given the step and the conditioning.

    forward(x_t, t, cond): x_t (B, 8, d, h, w); t an int or (B,) integers in 0 .. T - 1;
    cond (B, 9, d, h, w), the latent of the hollowed crop and the mask. Returns (B, 8, d, h, w).
    h and w must be multiples of config.size_multiple; d is free.
    """

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        widths = [config.dim * m for m in config.multipliers]
        inputs = [config.dim, *widths[:-1]]

        self.first = slice_conv(config.in_channels, config.dim, 7)
        self.first_depth = DepthAttention(config.dim, config)
        self.time = TimeEmbedding(config)
        self.rotary = Rotary(config.rotary_dim)
        self.bias = RelativePositionBias(config)

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
        """The network's input (B, in_channels, d, h, w) and the steps (B,)."""
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

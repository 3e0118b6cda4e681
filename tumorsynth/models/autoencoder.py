"""The 3-D autoencoder: maps CT crops to smaller latents and back (paper 3.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tumorsynth.intensity import HU_HIGH, HU_LOW
from tumorsynth.models.codebook import Codebook
from tumorsynth.models.conv import Conv3d, GroupNorm, cpu_layout
from tumorsynth.models.layers import Conv, ResidualBlock, UpConv
from tumorsynth.models.slabs import Near, run_layers


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder. The defaults are those of DiffTumor's published VQGAN.

    Args:
        patch: side of the blocks of voxels that are folded into channels first; above 1, no layer
            runs at full resolution.
        encoder_widths: channels of each level; every level after the first halves the size.
        decoder_widths: channels of each level; every level after the first doubles the size.
        encoder_blocks: residual blocks of each encoder level after the first.
        decoder_blocks: residual blocks of each decoder level after the first.
        inner_blocks: residual blocks at the first width of encoder and decoder.
        latent_channels: channels of the latent.
        detail_channels: numbers for each latent voxel that carry what the decoder leaves out of a
            scan, above all its noise. The denoiser never sees them, see `Autoencoder.detail`.
        codes: size of the codebook; 0 leaves the latent continuous.
        groups: groups of every GroupNorm.
        padding: "replicate", or "zeros", which is faster and differs only near the crop's faces.
        window: HU that -1 and 1 stand for in the network.

    Raises:
        ValueError: if a value is out of range or two do not fit together.
    """

    patch: int = 1
    encoder_widths: tuple[int, ...] = (16, 32, 64)
    decoder_widths: tuple[int, ...] = (64, 64, 32)
    encoder_blocks: int = 1
    decoder_blocks: int = 2
    inner_blocks: int = 0
    latent_channels: int = 8
    detail_channels: int = 0
    codes: int = 16384
    groups: int = 32
    padding: str = "replicate"
    window: tuple[float, float] = (HU_LOW, HU_HIGH)

    def __post_init__(self) -> None:
        # JSON gives lists; equality and hashing need tuples
        object.__setattr__(self, "encoder_widths", tuple(self.encoder_widths))
        object.__setattr__(self, "decoder_widths", tuple(self.decoder_widths))
        object.__setattr__(self, "window", tuple(float(hu) for hu in self.window))
        if not (len(self.window) == 2 and -math.inf < self.window[0] < self.window[1] < math.inf):
            raise ValueError(
                f"window must be (low, high) in HU with low < high, got {self.window}; pass for "
                f"example {(HU_LOW, HU_HIGH)}"
            )
        if self.padding not in ("replicate", "zeros"):
            raise ValueError(
                f'padding must be "replicate" or "zeros", got {self.padding!r}; pass one of them'
            )
        if not 0 <= self.detail_channels <= self.factor**3:
            raise ValueError(
                f"detail_channels must be 0 to {self.factor**3}, the voxels of a latent voxel, got "
                f"{self.detail_channels}; pass 0 for none"
            )
        if len(self.encoder_widths) != len(self.decoder_widths):
            raise ValueError(
                "encoder and decoder need the same number of widths, got "
                f"{self.encoder_widths} and {self.decoder_widths}; pass lists of one length"
            )

    @property
    def factor(self) -> int:
        """Voxels per latent voxel along each axis."""
        return self.patch * 2 ** (len(self.encoder_widths) - 1)


LIGHT = AutoencoderConfig(
    patch=2,
    encoder_widths=(32, 64),
    decoder_widths=(64, 32),
    inner_blocks=1,
    codes=0,
    groups=8,
    padding="zeros",
)


class Encoder(nn.Module):
    """(B, 1, D, H, W) -> raw latent (B, latent_channels, d, h, w)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        c, widths = config, config.encoder_widths
        self.patch = c.patch
        self.stem = Conv(c.patch**3, widths[0], 3, 1, c.padding)
        self.inner = _residual_blocks(c.inner_blocks, widths[0], c)
        self.levels = nn.ModuleList(
            nn.Sequential(
                Conv(wide, width, 4, 2, c.padding), *_residual_blocks(c.encoder_blocks, width, c)
            )
            for wide, width in zip(widths, widths[1:], strict=False)
        )
        self.norm = GroupNorm(c.groups, widths[-1], eps=1e-6)
        self.head = Conv3d(widths[-1], c.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.patch > 1:
            p = self.patch
            x = rearrange(x, "b c (d p) (h q) (w r) -> b (c p q r) d h w", p=p, q=p, r=p)
        x = run_layers([self.stem, self.inner, *self.levels], x)
        return self.head(F.silu(self.norm(x)))


class Decoder(nn.Module):
    """(B, latent_channels, d, h, w) -> (B, 1, D, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        c, widths = config, config.decoder_widths
        self.patch = c.patch
        self.stem = Conv3d(c.latent_channels, widths[0], 1)
        self.norm = GroupNorm(c.groups, widths[0], eps=1e-6)
        self.inner = _residual_blocks(c.inner_blocks, widths[0], c)
        self.levels = nn.ModuleList(
            nn.Sequential(
                UpConv(wide, width, c.padding), *_residual_blocks(c.decoder_blocks, width, c)
            )
            for wide, width in zip(widths, widths[1:], strict=False)
        )
        self.head = Conv(widths[-1], c.patch**3, 3, 1, c.padding)

    def forward(self, latent: Tensor, near: Near | None = None) -> Tensor:
        """Decode a quantised latent.

        Args:
            latent: (B, 8, d, h, w).
            near: slices of the voxels to return, in whole latent voxels; None returns all.
        """
        p = self.patch
        if near is not None and p > 1:
            near = _divide(near, p)
        x = F.silu(self.norm(self.stem(cpu_layout(latent))))
        x = run_layers([self.inner, *self.levels, self.head], x, near)
        if p > 1:
            x = rearrange(x, "b (c p q r) d h w -> b c (d p) (h q) (w r)", p=p, q=p, r=p)
        return x


def _divide(near: Near, by: int) -> Near:
    x, y, z = (slice(n.start // by, n.stop // by) for n in near)
    return x, y, z


def _to_blocks(volume: Tensor, side: int) -> Tensor:
    """(B, 1, D, H, W) -> (blocks, side^3)."""
    return rearrange(volume, "b 1 (d p) (h q) (w r) -> (b d h w) (p q r)", p=side, q=side, r=side)


def _residual_blocks(count: int, width: int, config: AutoencoderConfig) -> nn.Sequential:
    return nn.Sequential(
        *(ResidualBlock(width, config.groups, config.padding) for _ in range(count))
    )


class Autoencoder(nn.Module):
    """Encoder, codebook and decoder. Volumes are in [-1, 1] with axes (z, x, y).

    -1 and 1 stand for the ends of ``config.window``. Sides of a volume are multiples of
    ``config.factor``.

    Args:
        config: sizes.
    """

    latent_low: Tensor
    latent_high: Tensor
    detail_basis: Tensor

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.codebook = Codebook(config.codes, config.latent_channels) if config.codes else None
        # range of a continuous latent, measured after training; a codebook defines its own
        self.register_buffer("latent_low", torch.tensor(-1.0), persistent=not config.codes)
        self.register_buffer("latent_high", torch.tensor(1.0), persistent=not config.codes)
        # orthonormal rows from `fit_detail`; zeros add no detail
        basis = torch.zeros(config.detail_channels, config.factor**3)
        self.register_buffer("detail_basis", basis, persistent=config.detail_channels > 0)

    def encode(self, x: Tensor) -> Tensor:
        """Encode a volume to a raw latent, which is not quantised.

        Args:
            x: (B, 1, D, H, W) in [-1, 1].

        Returns:
            (B, 8, D / factor, H / factor, W / factor).

        Raises:
            ValueError: if the shape does not fit.
        """
        factor = self.config.factor
        if x.ndim != 5 or x.shape[1] != 1 or any(side % factor for side in x.shape[2:]):
            raise ValueError(
                f"a crop to encode must be (B, 1, D, H, W) with sides that are multiples of "
                f"{factor}, got {tuple(x.shape)}; pad or crop it"
            )
        return self.encoder(x)

    def codes(self, latent: Tensor) -> Tensor:
        """Return the index of the nearest code: (B, 8, d, h, w) -> (B, d, h, w) int64."""
        if self.codebook is None:
            raise ValueError(
                "an autoencoder must have a codebook for this, but its config has codes=0; use its "
                "continuous latent"
            )
        return self.codebook.nearest(latent)

    def quantize(self, latent: Tensor) -> Tensor:
        """Replace every latent voxel by its nearest code; without a codebook, change nothing."""
        if self.codebook is None:
            return latent
        return self.codebook.lookup(self.codebook.nearest(latent)).to(latent.dtype)

    def decode(self, latent: Tensor, near: Near | None = None) -> Tensor:
        """Quantise and decode a raw latent.

        Args:
            latent: (B, 8, d, h, w).
            near: slices of the voxels to return, in whole latent voxels; None returns all.

        Returns:
            (B, 1, D, H, W), or that part of it.
        """
        return self.decoder(self.quantize(latent), near)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x, with its detail."""
        decoded = self.decode(self.encode(x))
        return decoded + self.detail(x - decoded)

    def detail(self, residual: Tensor) -> Tensor:
        """Return the part of a residual that the detail channels keep.

        Each block of ``factor``^3 voxels is projected on the principal components from
        `fit_detail`.

        Args:
            residual: (B, 1, D, H, W), a volume minus its decoded latent.

        Returns:
            Same shape; 0 without detail channels.
        """
        if not self.config.detail_channels:
            return torch.zeros_like(residual)
        f, basis = self.config.factor, self.detail_basis
        d, h, w = (n // f for n in residual.shape[2:])
        blocks = _to_blocks(residual.float(), f)
        with torch.autocast(residual.device.type, enabled=False):
            kept = (blocks @ basis.T) @ basis
        return rearrange(
            kept, "(b d h w) (p q r) -> b 1 (d p) (h q) (w r)", d=d, h=h, w=w, p=f, q=f, r=f
        ).to(residual.dtype)

    @torch.no_grad()
    def fit_detail(self, crops: Iterable[Tensor]) -> None:
        """Fit the principal components of `detail`, in closed form.

        They are the eigenvectors with the largest eigenvalues of the residuals' covariance.

        Args:
            crops: (B, 1, D, H, W) each, in [-1, 1].
        """
        f, channels = self.config.factor, self.config.detail_channels
        if not channels:
            return
        covariance = torch.zeros(f**3, f**3, dtype=torch.float64)
        for crop in crops:
            blocks = _to_blocks(crop - self.decode(self.encode(crop)).float(), f).double().cpu()
            covariance += blocks.T @ blocks
        _, vectors = torch.linalg.eigh(covariance)  # the largest come last
        self.detail_basis.copy_(vectors.T.flip(0)[:channels])

    def reconstruct(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct x with gradients, for training.

        In training mode the codebook is updated, and the quantised latent passes its gradient
        straight through.

        Args:
            x: (B, 1, D, H, W) in [-1, 1].
            generator: draws the initial codes, see `Codebook.forward`.

        Returns:
            Reconstruction, latent and quantised latent; without a codebook the last two are equal.
        """
        latent = self.encode(x)
        quantised = latent if self.codebook is None else self.codebook(latent, generator)[0]
        return self.decoder(quantised), latent, quantised

    def normalize(self, latent: Tensor) -> Tensor:
        """Scale a raw latent to [-1, 1], the denoiser's scale."""
        low, high = self._range()
        return 2 * (latent - low) / (high - low) - 1

    def denormalize(self, latent: Tensor) -> Tensor:
        """Return the raw latent of a normalised one, the inverse of `normalize`."""
        low, high = self._range()
        return (latent + 1) / 2 * (high - low) + low

    def _range(self) -> tuple[Tensor, Tensor]:
        if self.codebook is None:
            return self.latent_low, self.latent_high
        derived = self.codebook.derived()
        return derived.lowest, derived.highest

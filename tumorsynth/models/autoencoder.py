"""The 3-D autoencoder: a CT crop to a latent 4x smaller along each axis, and back (paper 3.1)."""

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
from tumorsynth.models.slabs import Near, through


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder. The defaults are the published VQGAN of DiffTumor.

    ``patch`` 2 folds 2x2x2 voxels into channels first, so that no layer runs at full resolution:
    most of the published decoder's time is spent there. ``codes`` 0 leaves the latent continuous.
    Each encoder width after the first, and each decoder width after the first, is one factor of 2.
    ``detail_channels`` numbers more per latent voxel carry what the decoder leaves out of a scan,
    above all its noise, past the denoiser, which never sees them: see `Autoencoder.detail`.
    """

    patch: int = 1
    encoder_widths: tuple[int, ...] = (16, 32, 64)
    decoder_widths: tuple[int, ...] = (64, 64, 32)
    encoder_blocks: int = 1
    decoder_blocks: int = 2
    inner_blocks: int = 0  # at the first encoder width and at the first decoder width
    latent_channels: int = 8
    detail_channels: int = 0
    codes: int = 16384
    groups: int = 32
    padding: str = "replicate"  # or "zeros": faster, different only next to the crop's faces
    window: tuple[float, float] = (HU_LOW, HU_HIGH)  # HU that are -1 and 1 for the network

    def __post_init__(self) -> None:
        # JSON gives lists; equality and hashing want tuples
        object.__setattr__(self, "encoder_widths", tuple(self.encoder_widths))
        object.__setattr__(self, "decoder_widths", tuple(self.decoder_widths))
        object.__setattr__(self, "window", tuple(float(hu) for hu in self.window))
        if not (len(self.window) == 2 and -math.inf < self.window[0] < self.window[1] < math.inf):
            raise ValueError(f"window must be (low, high) in HU with low < high, got {self.window}")
        if self.padding not in ("replicate", "zeros"):
            raise ValueError(f'padding must be "replicate" or "zeros", got {self.padding!r}')
        if not 0 <= self.detail_channels <= self.factor**3:
            raise ValueError(
                f"detail_channels must be 0 to {self.factor**3}, the voxels of a latent voxel, got "
                f"{self.detail_channels}"
            )
        if len(self.encoder_widths) != len(self.decoder_widths):
            raise ValueError(
                "encoder and decoder need the same number of widths, got "
                f"{self.encoder_widths} and {self.decoder_widths}"
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
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        c, widths = config, config.encoder_widths
        self.patch = c.patch
        self.stem = Conv(c.patch**3, widths[0], 3, 1, c.padding)
        self.inner = _blocks(c.inner_blocks, widths[0], c)
        self.levels = nn.ModuleList(
            nn.Sequential(Conv(wide, width, 4, 2, c.padding), *_blocks(c.encoder_blocks, width, c))
            for wide, width in zip(widths, widths[1:], strict=False)
        )
        self.norm = GroupNorm(c.groups, widths[-1], eps=1e-6)
        self.head = Conv3d(widths[-1], c.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.patch > 1:
            p = self.patch
            x = rearrange(x, "b c (d p) (h q) (w r) -> b (c p q r) d h w", p=p, q=p, r=p)
        x = through([self.stem, self.inner, *self.levels], x)
        return self.head(F.silu(self.norm(x)))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        c, widths = config, config.decoder_widths
        self.patch = c.patch
        self.stem = Conv3d(c.latent_channels, widths[0], 1)
        self.norm = GroupNorm(c.groups, widths[0], eps=1e-6)
        self.inner = _blocks(c.inner_blocks, widths[0], c)
        self.levels = nn.ModuleList(
            nn.Sequential(UpConv(wide, width, c.padding), *_blocks(c.decoder_blocks, width, c))
            for wide, width in zip(widths, widths[1:], strict=False)
        )
        self.head = Conv(widths[-1], c.patch**3, 3, 1, c.padding)

    def forward(self, latent: Tensor, near: Near | None = None) -> Tensor:
        """(B, 8, d, h, w) -> (B, 1, D, H, W), or its voxels ``near``, whole latent voxels."""
        p = self.patch
        if near is not None and p > 1:
            near = _scaled(near, p)
        x = F.silu(self.norm(self.stem(cpu_layout(latent))))
        x = through([self.inner, *self.levels, self.head], x, near)
        if p > 1:
            x = rearrange(x, "b (c p q r) d h w -> b c (d p) (h q) (w r)", p=p, q=p, r=p)
        return x


def _scaled(near: Near, by: int) -> Near:
    x, y, z = (slice(n.start // by, n.stop // by) for n in near)
    return x, y, z


def _blocks_of(volume: Tensor, side: int) -> Tensor:
    """(B, 1, D, H, W) -> (blocks, side^3)."""
    return rearrange(volume, "b 1 (d p) (h q) (w r) -> (b d h w) (p q r)", p=side, q=side, r=side)


def _blocks(count: int, width: int, config: AutoencoderConfig) -> nn.Sequential:
    return nn.Sequential(
        *(ResidualBlock(width, config.groups, config.padding) for _ in range(count))
    )


class Autoencoder(nn.Module):
    """Encoder, codebook and decoder. Inputs and outputs are in [-1, 1], axes (z, x, y).

    -1 stands for -175 HU and 1 for 250 HU. A crop's sides must be multiples of ``config.factor``.
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
        # range of a continuous latent, measured at the end of its training; a codebook has its own
        self.register_buffer("latent_low", torch.tensor(-1.0), persistent=not config.codes)
        self.register_buffer("latent_high", torch.tensor(1.0), persistent=not config.codes)
        # orthonormal rows, found after the training by `fit_detail`; until then there is no detail
        basis = torch.zeros(config.detail_channels, config.factor**3)
        self.register_buffer("detail_basis", basis, persistent=config.detail_channels > 0)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 1, D, H, W) in [-1, 1] -> (B, 8, D/4, H/4, W/4), raw: not quantised."""
        factor = self.config.factor
        if x.ndim != 5 or x.shape[1] != 1 or any(side % factor for side in x.shape[2:]):
            raise ValueError(
                f"a crop to encode must be (B, 1, D, H, W) with sides that are multiples of "
                f"{factor}, got {tuple(x.shape)}; pad or crop it"
            )
        return self.encoder(x)

    def codes(self, latent: Tensor) -> Tensor:
        """Index of the nearest code: (B, 8, d, h, w) -> (B, d, h, w) int64."""
        if self.codebook is None:
            raise ValueError("this autoencoder has a continuous latent and no codes")
        return self.codebook.nearest(latent)

    def quantize(self, latent: Tensor) -> Tensor:
        """Every latent voxel replaced by its nearest code; unchanged where there is no codebook."""
        if self.codebook is None:
            return latent
        return self.codebook.lookup(self.codebook.nearest(latent)).to(latent.dtype)

    def decode(self, latent: Tensor, near: Near | None = None) -> Tensor:
        """(B, 8, d, h, w) -> (B, 1, D, H, W): quantised first, then decoded.

        near: slices of the voxels that are wanted, whole latent voxels; they alone are returned.
        """
        return self.decoder(self.quantize(latent), near)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x: decoded, with its detail."""
        decoded = self.decode(self.encode(x))
        return decoded + self.detail(x - decoded)

    def detail(self, missed: Tensor) -> Tensor:
        """What ``detail_channels`` numbers per latent voxel keep of a volume (B, 1, D, H, W).

        missed: a scan minus its decoded latent. The numbers are its projections, block of
        ``factor``^3 voxels by block, on the directions in which most of it lies (principal
        components). 0 where there are no such channels.
        """
        if not self.config.detail_channels:
            return torch.zeros_like(missed)
        f, basis = self.config.factor, self.detail_basis
        d, h, w = (n // f for n in missed.shape[2:])
        blocks = _blocks_of(missed.float(), f)
        with torch.autocast(missed.device.type, enabled=False):
            kept = (blocks @ basis.T) @ basis
        return rearrange(
            kept, "(b d h w) (p q r) -> b 1 (d p) (h q) (w r)", d=d, h=h, w=w, p=f, q=f, r=f
        ).to(missed.dtype)

    @torch.no_grad()
    def fit_detail(self, crops: Iterable[Tensor]) -> None:
        """Find the directions of :meth:`detail` from crops (B, 1, D, H, W) in [-1, 1], in closed
        form: the largest eigenvectors of the covariance of what the decoder leaves out of them."""
        f, channels = self.config.factor, self.config.detail_channels
        if not channels:
            return
        covariance = torch.zeros(f**3, f**3, dtype=torch.float64)
        for crop in crops:
            blocks = _blocks_of(crop - self.decode(self.encode(crop)).float(), f).double().cpu()
            covariance += blocks.T @ blocks
        _, vectors = torch.linalg.eigh(covariance)  # the largest come last
        self.detail_basis.copy_(vectors.T.flip(0)[:channels])

    def reconstruct(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, latent and quantised latent of x: a step of training, with gradients.

        In training mode the codebook learns from the latent, and the quantised one passes its
        gradient straight through; ``generator`` draws the first codes (see `Codebook.forward`).
        Without a codebook it is the latent.
        """
        latent = self.encode(x)
        quantised = latent if self.codebook is None else self.codebook(latent, generator)[0]
        return self.decoder(quantised), latent, quantised

    def normalize(self, latent: Tensor) -> Tensor:
        """Raw latent -> [-1, 1]: ``2 (z - min) / (max - min) - 1``, the denoiser's scale."""
        low, high = self._range()
        return 2 * (latent - low) / (high - low) - 1

    def denormalize(self, latent: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        low, high = self._range()
        return (latent + 1) / 2 * (high - low) + low

    def _range(self) -> tuple[Tensor, Tensor]:
        if self.codebook is None:
            return self.latent_low, self.latent_high
        return self.codebook.embeddings.min(), self.codebook.embeddings.max()

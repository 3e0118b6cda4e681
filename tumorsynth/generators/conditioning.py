"""Inputs of the networks from a crop and a mask: axes, mask channel, contrast, needed box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.appearance.contrast import (
    ContrastConfig,
    requested_contrast,
    sampled_contrast,
    shift_to_contrast,
)
from tumorsynth.arguments import any_bool
from tumorsynth.devices import onto
from tumorsynth.models.slabs import Near

CONTRAST_UNITS_PER_WINDOW = 8  # the contrast channel counts eighths of the window


@dataclass(frozen=True)
class ContrastTarget:
    """The contrast that painted tumours must have.

    Args:
        tumor_mask: bool, (B, 1, X, Y, Z).
        level_hu: (B,), HU of the tissue that the contrast is relative to.
        contrast_hu: (B,), HU between each tumour's core and ``level_hu``.
        window: HU that 0 and 1 in a crop stand for.
    """

    tumor_mask: Tensor
    level_hu: Tensor
    contrast_hu: Tensor
    window: tuple[float, float]

    def correction(self, painted: Tensor) -> Tensor:
        """Return what to add to a painted crop, in its scale, so that the contrast is met."""
        low, high = self.window
        hu = crop_to_hu(painted, self.window)
        return shift_to_contrast(hu, self.tumor_mask, self.level_hu, self.contrast_hu) / (
            high - low
        )


@dataclass(frozen=True)
class NetworkInputs:
    """What the networks need to paint a batch of crops. Axes are (z, x, y).

    Args:
        volume: (B, 1, D, H, W) in [-1, 1], the healthy crop.
        cond: (B, 9 or 10, d, h, w), the denoiser's conditioning.
        noise: (draws, B, channels, d, h, w).
        target: the contrast to meet; None leaves the contrast to the denoiser.
    """

    volume: Tensor
    cond: Tensor
    noise: Tensor
    target: ContrastTarget | None


def contrast_target(
    crop: Tensor,
    tumor_mask: Tensor,
    window: tuple[float, float],
    config: ContrastConfig | None,
    seeds: Sequence[int] | None,
    contrast_hu: float | Sequence[float] | Tensor | None,
) -> ContrastTarget | None:
    """Return the contrast to meet: the caller's, else one sampled as the denoiser was trained.

    Args:
        crop: (B, 1, X, Y, Z) in [0, 1].
        tumor_mask: bool, same shape.
        window: HU that 0 and 1 in the crop stand for.
        config: contrasts that the denoiser was trained with; None if it takes no contrast.
        seeds: one for each sample; None takes the middle of the range.
        contrast_hu: the caller's contrast, one number or one for each sample.

    Raises:
        ValueError: if shapes differ or ``contrast_hu`` is not one number or B numbers.
    """
    if contrast_hu is None and config is None:
        return None
    check_pair(crop, tumor_mask)
    hu = crop_to_hu(crop, window)
    if contrast_hu is not None:
        requested = onto(torch.as_tensor(contrast_hu, dtype=hu.dtype), hu.device)
        if any_bool(contrast_hu) or requested.ndim > 1 or requested.numel() not in (1, len(crop)):
            raise ValueError(
                f"contrast_hu must be one number, or one for each of the {len(crop)} samples, "
                f"got {contrast_hu!r}; pass for example -35.0"
            )
        found = requested_contrast(hu, tumor_mask, requested.expand(len(crop)))
    else:
        assert config is not None
        found = sampled_contrast(hu, tumor_mask, config, seeds)
    return ContrastTarget(tumor_mask, found.level, found.contrast, window)


def mask_channel(hole: Tensor, size: torch.Size, method: str) -> Tensor:
    """Bring a mask to latent size, in [-1, 1].

    Args:
        hole: (B, 1, D, H, W), 1 in the tumour, else 0.
        size: (d, h, w) of the latent.
        method: "area", the tumour's share of each latent voxel; or "nearest", in which a tumour
            that nearest sampling would miss takes the latent voxels that hold most of it.
    """
    area = F.interpolate(hole, size=size, mode="area")
    if method == "area":
        return area * 2 - 1
    mask = F.interpolate(hole, size=size)
    fullest = (area == area.amax((2, 3, 4), keepdim=True)) & (area > 0)
    missed = mask.amax((2, 3, 4), keepdim=True) == 0
    return torch.where(missed, fullest.to(mask.dtype), mask) * 2 - 1


def contrast_channel(
    hole: Tensor, size: torch.Size, contrast_hu: Tensor, window: tuple[float, float]
) -> Tensor:
    """Return the tumour's share of each latent voxel times its contrast, in eighths of the window.

    Args:
        hole: (B, 1, D, H, W), 1 in the tumour, else 0.
        size: (d, h, w) of the latent.
        contrast_hu: (B,).
        window: HU that 0 and 1 in a crop stand for.
    """
    low, high = window
    share = F.interpolate(hole, size=size, mode="area")
    return (
        share * (contrast_hu * CONTRAST_UNITS_PER_WINDOW / (high - low))[:, None, None, None, None]
    )


def latent_box(near: Near | None, sides: Sequence[int], factor: int) -> Near:
    """Grow a part of a crop to whole latent voxels and turn it to axes (z, x, y).

    Args:
        near: slices along X, Y and Z; None is the whole crop.
        sides: of the crop, along X, Y and Z.
        factor: voxels per latent voxel along an axis.

    Raises:
        ValueError: if ``near`` is not three slices with a start and a stop within the crop.
    """
    if near is None:
        near = (slice(0, sides[0]), slice(0, sides[1]), slice(0, sides[2]))
    fits = len(near) == 3 and all(
        isinstance(n, slice)
        and isinstance(n.start, int)
        and isinstance(n.stop, int)
        and n.step in (None, 1)
        and 0 <= n.start < n.stop <= side
        for n, side in zip(near, sides, strict=False)
    )
    if not fits:
        raise ValueError(
            f"near must be three slices within the crop of {tuple(sides)}, each with a start "
            f"and a stop, got {near!r}; pass for example (slice(20, 44),) * 3, or None for all"
        )
    x, y, z = (
        slice(n.start // factor * factor, min(-(-n.stop // factor) * factor, side))
        for n, side in zip(near, sides, strict=True)
    )
    return z, x, y


def paste(part: Tensor, background: Tensor, box: Near) -> Tensor:
    """Return ``background`` with ``part`` in its box; ``part`` itself if it is the whole."""
    if part.shape == background.shape:
        return part
    background = background.clone()
    background[..., box[0], box[1], box[2]] = part.to(background.dtype)
    return background


def check_pair(crop: Tensor, tumor_mask: Tensor) -> None:
    """Raise ValueError unless crop and mask are both (B, 1, X, Y, Z)."""
    if crop.shape != tumor_mask.shape or crop.ndim != 5 or crop.shape[1] != 1:
        raise ValueError(
            f"crop and tumor_mask must have the same shape (B, 1, X, Y, Z), got "
            f"{tuple(crop.shape)} and {tuple(tumor_mask.shape)}; cut both alike"
        )


def crop_to_hu(crop: Tensor, window: tuple[float, float]) -> Tensor:
    """Convert a crop in [0, 1] to HU."""
    low, high = window
    return crop.float() * (high - low) + low


def to_zxy(x: Tensor) -> Tensor:
    """(B, C, x, y, z) -> (B, C, z, x, y), the order of axes in the networks."""
    return x.permute(0, 1, 4, 2, 3).contiguous()


def to_xyz(x: Tensor) -> Tensor:
    """(B, C, z, x, y) -> (B, C, x, y, z)."""
    return x.permute(0, 1, 3, 4, 2).contiguous()

"""How much of a change each voxel takes: feathered weights on the user's grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from tumorsynth.devices import onto

BLENDS = ("change", "difftumor")
ONE_SIGMA = 0.159  # of a filtered edge: what is left of it one standard deviation outside
MIN_SIGMA_VOXELS = 0.4  # an edge of the scan is never sharper than its sampling


def reach(
    sigma_mm: float | Sequence[float],
    spacing: Sequence[float],
    blend: str,
    softened_mm: Sequence[float] = (0.0, 0.0, 0.0),
) -> tuple[int, int, int]:
    """Voxels by which the feather reaches beyond the tumour along each axis."""
    sigmas = _sigmas(sigma_mm, spacing, blend)
    a, b, c = (
        _radius(sigma, _cut(blend)) + math.ceil(further / s)
        for sigma, further, s in zip(sigmas, softened_mm, spacing, strict=True)
    )
    return a, b, c


def feather(
    tumor_mask: Tensor,
    sigma_mm: float | Sequence[float],
    spacing: Sequence[float],
    blend: str,
    own_edge: bool = False,
    voxels: int | None = None,
    softened_mm: Sequence[float] = (0.0, 0.0, 0.0),
) -> Tensor:
    """Blend weights in [0, 1], float32, of the same shape as the local ``tumor_mask`` (X, Y, Z).

    The mask must reach :func:`reach` voxels beyond the tumour, or up to the sample's border, where
    it is mirrored. sigma_mm: one for all axes, or one for each. voxels: of the tumour, if known: a
    GPU is not waited for then.

    "difftumor": the Gaussian-filtered mask as published (alpha, sigma in voxels of the 1 mm grid,
    cut off at 4 sigma). With sigma 4 the weight of a 5 mm tumour peaks at 0.1: a label on
    something that cannot be seen.

    "change": the same filter, cut off at 3 sigma, sigma limited to a third of the tumour's radius,
    and scaled so that the weight reaches 1 inside every tumour. own_edge: what is weighted has a
    soft edge already, as decoded crops do; then the weight is 1 up to the outline and falls off
    outside, or the edge would be softened twice and a small tumour be faint. Where such a change
    was softened further (softened_mm, for each axis), it falls off that much further out, or the
    outer half of the soft edge would be cut off.
    """
    weight = tumor_mask.to(torch.float32)
    if blend == "change":
        voxels = int(tumor_mask.sum()) if voxels is None else voxels
        volume = voxels * math.prod(spacing)
        radius = (3 * volume / (4 * math.pi)) ** (1 / 3)
        sigma_mm = [min(sigma, radius / 3) for sigma in _each(sigma_mm)]
        if own_edge and any(softened_mm):
            further = [min(m, radius / 3) / s for m, s in zip(softened_mm, spacing, strict=True)]
            outline = gaussian_filter(weight, further) > ONE_SIGMA
            weight = outline.logical_or_(tumor_mask).to(torch.float32)
    weight = gaussian_filter(weight, _sigmas(sigma_mm, spacing, blend), _cut(blend))
    if blend == "change":
        # the division makes the peak 1 even when the filter is as wide as the tumour; 2 % less
        # makes it a plateau
        peak = (weight * tumor_mask).amax().clamp(min=1e-12)
        weight = ((2.0 if own_edge else 1.0) * weight / (0.98 * peak)).clamp(max=1.0)
        # never nothing where there is a label, not even at the tip of a spike
        weight = torch.where((weight < 0.005) & ~tumor_mask, 0.0, weight)
    return weight


def gaussian_filter(volume: Tensor, sigmas: Sequence[float], cut: float = 3.0) -> Tensor:
    """(X, Y, Z) filtered along each axis; sigmas in voxels, cut off at ``cut`` sigmas, mirrored."""
    for axis, sigma in enumerate(sigmas):
        if sigma > 0:
            matrix = onto(_gaussian(volume.shape[axis], sigma, _radius(sigma, cut)), volume.device)
            volume = torch.movedim(torch.tensordot(matrix, volume, dims=([1], [axis])), 0, axis)
    return volume


def _each(sigma_mm: float | Sequence[float]) -> list[float]:
    return [float(sigma_mm)] * 3 if isinstance(sigma_mm, Real) else [float(s) for s in sigma_mm]  # type: ignore[union-attr]


def _sigmas(sigma_mm: float | Sequence[float], spacing: Sequence[float], blend: str) -> list[float]:
    lowest = MIN_SIGMA_VOXELS if blend == "change" else 0.0
    return [max(sigma / s, lowest) for sigma, s in zip(_each(sigma_mm), spacing, strict=True)]


def _cut(blend: str) -> float:
    return 4.0 if blend == "difftumor" else 3.0


def _radius(sigma: float, cut: float) -> int:
    return int(cut * sigma + 0.5)


def _gaussian(count: int, sigma: float, radius: int) -> Tensor:
    """(count, count) matrix of a Gaussian filter, mirrored at both ends (SciPy's "reflect")."""
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    at = (np.arange(count)[:, None] + offsets[None, :]) % (2 * count)
    at = np.where(at < count, at, 2 * count - 1 - at)
    matrix = np.zeros((count, count))
    np.add.at(matrix, (np.arange(count)[:, None], at), kernel[None, :])
    return torch.from_numpy(matrix.astype(np.float32))

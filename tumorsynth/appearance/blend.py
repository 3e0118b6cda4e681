"""Feathered blend weights: how much of a change each voxel takes, on the sample's own grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tumorsynth.along_axis import multiply_along
from tumorsynth.devices import onto, stream_of
from tumorsynth.geometry import Frame, Rows3

BLENDS = ("change", "difftumor")
CUTOFF_SIGMAS = {"change": 3.0, "difftumor": 4.0}  # the second as published
MIN_SIGMA_VOXELS = 0.4  # an edge of the scan is never sharper than its sampling
EDGE_AT_ONE_SIGMA = 0.159  # what a filtered edge leaves one standard deviation outside
PLATEAU_SHARE = 0.98  # weights from this share of the peak on become 1
MAX_KEPT_COUNT = 176  # voxels along an axis, up to which a filter's matrix is kept
MIN_WEIGHT = 0.005  # smaller weights outside the tumour become 0


def feather_reach(
    sigma_mm: float | Sequence[float],
    spacing: Sequence[float],
    blend: str,
    softened_mm: Sequence[float] = (0.0, 0.0, 0.0),
) -> tuple[int, int, int]:
    """Return by how many voxels the feather reaches beyond the tumour along each axis.

    Args:
        sigma_mm: as for `feather`, like the others.
        spacing: mm per voxel.
        blend: one of `BLENDS`.
        softened_mm: how much the change was softened along each axis.
    """
    sigmas = _sigma_voxels(sigma_mm, spacing, blend)
    x, y, z = (
        _radius(sigma, CUTOFF_SIGMAS[blend]) + math.ceil(softened / s)
        for sigma, softened, s in zip(sigmas, softened_mm, spacing, strict=True)
    )
    return x, y, z


def feather(
    tumor_mask: Tensor,
    sigma_mm: float | Sequence[float],
    spacing: Sequence[float],
    blend: str,
    own_edge: bool = False,
    voxels: int | None = None,
    softened_mm: Sequence[float] = (0.0, 0.0, 0.0),
    shear: Rows3 | None = None,
) -> Tensor:
    """Compute blend weights around a tumour.

    With "difftumor" they are the Gaussian-filtered mask, as published (there alpha, with sigma in
    voxels of the 1 mm grid). With sigma 4 the weight of a 5 mm tumour peaks at 0.1, so that its
    label covers something that cannot be seen.

    With "change" sigma is limited to a third of the tumour's radius, and the weight is scaled to
    reach 1 inside every tumour.

    Args:
        tumor_mask: bool (X, Y, Z). It must extend `feather_reach` voxels beyond the tumour, or to
            the sample's border, where it is mirrored.
        sigma_mm: width of the Gaussian, one number or one for each axis.
        spacing: mm per voxel.
        blend: one of `BLENDS`.
        own_edge: whether the change has a soft edge already, as decoded crops do. The weight is
            then 1 up to the outline and falls off outside; softening the edge twice would make
            small tumours faint.
        voxels: how many voxels the tumour has; without it a GPU has to synchronise.
        softened_mm: how much a change with its own edge was softened along each axis. The weight
            falls off that much further out, to keep the outer half of the softened edge.
        shear: of the grid's axes; see `tumorsynth.geometry.Frame`.

    Returns:
        float32 in [0, 1], shaped like ``tumor_mask``.
    """
    weight = tumor_mask.to(torch.float32)
    x, y, z = spacing
    frame = Frame((x, y, z), shear=shear)
    cutoff = CUTOFF_SIGMAS[blend]
    if blend != "change":
        return filter_on(frame, weight, _sigma_voxels(sigma_mm, spacing, blend), cutoff)
    voxels = int(tumor_mask.sum()) if voxels is None else voxels
    volume = voxels * frame.voxel_mm3
    radius = (3 * volume / (4 * math.pi)) ** (1 / 3)
    sigma_mm = [min(sigma, radius / 3) for sigma in _per_axis(sigma_mm)]
    if own_edge and any(softened_mm):
        widening = [min(m, radius / 3) / s for m, s in zip(softened_mm, spacing, strict=True)]
        outline = filter_on(frame, weight, widening) > EDGE_AT_ONE_SIGMA
        weight = outline.logical_or_(tumor_mask).to(torch.float32)
    weight = filter_on(frame, weight, _sigma_voxels(sigma_mm, spacing, blend), cutoff)
    # makes the peak 1 even when the filter is as wide as the tumour
    peak = (weight * tumor_mask).amax().clamp(min=1e-12)
    weight = ((2.0 if own_edge else 1.0) * weight / (PLATEAU_SHARE * peak)).clamp(max=1.0)
    # every labelled voxel keeps some weight, even at the tip of a spike
    return torch.where((weight < MIN_WEIGHT) & ~tumor_mask, 0.0, weight)


def gaussian_filter(volume: Tensor, sigmas: Sequence[float], cutoff: float = 3.0) -> Tensor:
    """Filter a volume with a Gaussian along each axis, mirrored at its borders.

    Args:
        volume: of any shape.
        sigmas: standard deviation along each of its axes, in voxels; 0 leaves an axis as it is.
        cutoff: half width of the kernel in standard deviations.
    """
    for axis, sigma in enumerate(sigmas):
        if sigma > 0:
            count, radius = volume.shape[axis], _radius(sigma, cutoff)
            matrix = _matrix_on(volume.device, count, float(sigma), radius)
            volume = multiply_along(matrix, volume, axis)
    return volume


def filter_on(frame: Frame, volume: Tensor, sigmas: Sequence[float], cutoff: float = 3.0) -> Tensor:
    """Filter a volume with a Gaussian along right-angled axes, also where its own are sheared.

    Args:
        frame: of the volume.
        volume: (X, Y, Z).
        sigmas: standard deviation along each axis, in voxels.
        cutoff: half width of the kernel in standard deviations.
    """
    if frame.shear is None:
        return gaussian_filter(volume, sigmas, cutoff)
    spacing = np.array(frame.spacing)
    to_voxels = np.linalg.inv(frame.shear) / spacing[:, None]
    covariance = (to_voxels * (spacing * sigmas) ** 2) @ to_voxels.T
    reach = [math.ceil(cutoff * math.sqrt(variance)) for variance in np.diag(covariance)]
    offsets = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), -1)
    squares = ((offsets @ np.linalg.inv(covariance + 1e-9 * np.eye(3))) * offsets).sum(-1)
    kernel = np.where(squares <= cutoff**2, np.exp(-0.5 * squares), 0.0)
    taps = onto(torch.from_numpy(kernel / kernel.sum()), volume.device)
    margin = [r for r in reversed(reach) for _ in range(2)]
    padded = F.pad(volume[None, None].double(), margin, mode="replicate")[0, 0]
    spectrum = torch.fft.rfftn(padded) * torch.fft.rfftn(taps, s=padded.shape)
    filtered = torch.fft.irfftn(spectrum, s=padded.shape)
    # the kernel's middle lies at ``reach``: what ends up there belongs to voxel 0
    inner = tuple(slice(2 * r, 2 * r + n) for r, n in zip(reach, volume.shape, strict=True))
    return filtered[inner].clamp(min=0).to(volume.dtype).contiguous()


def _per_axis(sigma_mm: float | Sequence[float]) -> list[float]:
    return [float(sigma_mm)] * 3 if isinstance(sigma_mm, Real) else [float(s) for s in sigma_mm]  # type: ignore[union-attr]


def _sigma_voxels(
    sigma_mm: float | Sequence[float], spacing: Sequence[float], blend: str
) -> list[float]:
    lowest = MIN_SIGMA_VOXELS if blend == "change" else 0.0
    return [max(sigma / s, lowest) for sigma, s in zip(_per_axis(sigma_mm), spacing, strict=True)]


def _radius(sigma: float, cutoff: float) -> int:
    return int(cutoff * sigma + 0.5)


def _matrix_on(device: torch.device, count: int, sigma: float, radius: int) -> Tensor:
    """Return `_gaussian_matrix` on a device; kept, unless it is large. Do not change it."""
    if count > MAX_KEPT_COUNT:
        return onto(_gaussian_matrix(count, sigma, radius), device)
    return _kept_matrix(device, stream_of(device), count, sigma, radius)


@lru_cache(maxsize=256)  # 32 MB at most
def _kept_matrix(
    device: torch.device, stream: int, count: int, sigma: float, radius: int
) -> Tensor:
    with torch.inference_mode(False):  # a caller's may end before the matrix is used again
        return onto(_gaussian_matrix(count, sigma, radius), device)


def _gaussian_matrix(count: int, sigma: float, radius: int) -> Tensor:
    """(count, count) matrix of a Gaussian filter, mirrored at both ends (SciPy's "reflect")."""
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    at = (np.arange(count)[:, None] + offsets[None, :]) % (2 * count)
    at = np.where(at < count, at, 2 * count - 1 - at)
    matrix = np.zeros((count, count))
    np.add.at(matrix, (np.arange(count)[:, None], at), kernel[None, :])
    return torch.from_numpy(matrix.astype(np.float32))

"""Measure volumes at 1 mm: error, SSIM, noise, distances, contrast of a tumour.

Needs torch and NumPy alone: a training ends with these, also where nothing else is installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NOISE_SIGMA_MM = 1.5  # noise is the volume minus its Gaussian blur of this width
SSIM_SIGMA_MM = 1.5  # Wang et al. 2004, in three dimensions
SSIM_SIDE = 11  # voxels, of the window
NOISE_MARGIN_MM = 4  # from the edge of a region, which is no noise
MIN_CORE_VOXELS = 100  # of a region less its margin; smaller ones lose 1 mm only
MIN_TUMOR_CORE_VOXELS = 20  # of a tumour less its outermost voxels; smaller ones count whole
SHELL_MM = (2, 8)  # distance of the organ that a tumour is compared with


def high_pass_noise(volume: Tensor) -> Tensor:
    """Subtract from a volume (X, Y, Z) its Gaussian blur of 1.5 mm; edges are mirrored."""
    radius = int(4 * NOISE_SIGMA_MM + 0.5)
    padded = volume.float()
    for axis, n in enumerate(volume.shape):
        index = torch.arange(-radius, n + radius, device=volume.device) % (2 * n)
        padded = padded.index_select(axis, torch.where(index < n, index, 2 * n - 1 - index))
    return volume - _blur(padded[None], NOISE_SIGMA_MM, radius)[0]


def ssim_map(a: Tensor, b: Tensor, value_range: float) -> Tensor:
    """Compute the structural similarity of two volumes (Wang et al., IEEE TIP 2004).

    Args:
        a: (X, Y, Z).
        b: (X, Y, Z).
        value_range: difference between the largest and the smallest possible value.

    Returns:
        (X - 10, Y - 10, Z - 10): the voxels whose window of 11 voxels lies inside.

    Raises:
        ValueError: for sides under 11 voxels.
    """
    if min(a.shape) < SSIM_SIDE:
        raise ValueError(f"SSIM needs sides of at least {SSIM_SIDE} voxels, got {tuple(a.shape)}")
    # around zero, because squares of large values lose the digits of their differences
    middle = a.float().mean()
    a, b = (a.float() - middle) / value_range, (b.float() - middle) / value_range
    shift = float(middle) / value_range
    mean_a, mean_b, aa, bb, ab = _blur(
        torch.stack([a, b, a * a, b * b, a * b]), SSIM_SIGMA_MM, SSIM_SIDE // 2
    )
    spread_a, spread_b = aa - mean_a.square(), bb - mean_b.square()
    c1, c2 = 0.01**2, 0.03**2
    contrast = (2 * (ab - mean_a * mean_b) + c2) / (spread_a + spread_b + c2)
    mean_a, mean_b = mean_a + shift, mean_b + shift
    return contrast * (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)


def _blur(volumes: Tensor, sigma: float, radius: int) -> Tensor:
    """Blur (C, X, Y, Z) by a Gaussian along all axes; every side loses ``radius`` voxels."""
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    for axis in (1, 2, 3):  # sums of shifted volumes are faster than thin convolutions
        size = volumes.shape[axis] - 2 * radius
        shifted = (
            volumes.narrow(axis, k, size) * (w / sum(weights)) for k, w in enumerate(weights)
        )
        total = next(shifted)
        for part in shifted:
            total += part
        volumes = total
    return volumes


def distance_mm(mask: Tensor, reach: int) -> Tensor:
    """Compute the distance from each voxel of a 1 mm grid to the nearest voxel of a mask.

    Args:
        mask: (X, Y, Z) bool.
        reach: mm up to which the distance is exact.

    Returns:
        (X, Y, Z) float: 0 inside the mask, larger than ``reach`` (or infinite) beyond it.
    """
    squared = torch.where(mask, 0.0, float("inf"))
    for axis, n in enumerate(mask.shape):
        best = squared.clone()
        for step in range(1, min(reach, n - 1) + 1):
            ahead, behind = squared.narrow(axis, step, n - step), squared.narrow(axis, 0, n - step)
            left, right = best.narrow(axis, 0, n - step), best.narrow(axis, step, n - step)
            torch.minimum(left, ahead + step**2, out=left)
            torch.minimum(right, behind + step**2, out=right)
        squared = best
    return squared.sqrt()


def erode(mask: Tensor, times: int) -> Tensor:
    """Remove the outermost voxels of a mask (X, Y, Z): six neighbours, outside is background."""
    for _ in range(times):
        whole = F.pad(mask, (1,) * 6)
        for axis, n in enumerate(mask.shape):
            line = whole  # the mask, one voxel longer at both ends of this axis
            for other in {0, 1, 2} - {axis}:
                line = line.narrow(other, 1, mask.shape[other])
            mask = mask & line.narrow(axis, 0, n) & line.narrow(axis, 2, n)
    return mask


# -- reconstruction -------------------------------------------------------------------------------


@dataclass
class RegionErrors:
    """Errors of a reconstruction in one kind of tissue, summed crop by crop."""

    window: tuple[float, float]
    voxels: int = 0
    error: float = 0.0
    squared: float = 0.0
    similar: float = 0.0
    similar_voxels: int = 0
    noise_voxels: int = 0
    noise_in: float = 0.0
    noise_out: float = 0.0
    noise_squared_in: float = 0.0
    noise_squared_out: float = 0.0

    def add(self, difference: Difference, region: Tensor) -> None:
        """Add the voxels of a region (X, Y, Z) bool of one crop."""
        error = difference.error[region].double()
        self.voxels += error.numel()
        self.error += float(error.sum())
        self.squared += float(error.square().sum())
        if difference.ssim is not None:
            edge = SSIM_SIDE // 2
            similar = difference.ssim[region[edge:-edge, edge:-edge, edge:-edge]].double()
            self.similar += float(similar.sum())
            self.similar_voxels += similar.numel()
        core = erode(region, NOISE_MARGIN_MM)
        if int(core.sum()) < MIN_CORE_VOXELS:
            core = erode(region, 1)
        before, after = (n[core].double() for n in difference.noise)
        self.noise_voxels += before.numel()
        self.noise_in += float(before.sum())
        self.noise_out += float(after.sum())
        self.noise_squared_in += float(before.square().sum())
        self.noise_squared_out += float(after.square().sum())

    def figures(self) -> dict[str, float]:
        """Return RMSE, bias and noise in HU, PSNR in dB (range: the window) and SSIM, JSON-able."""
        low, high = self.window
        rmse = (self.squared / self.voxels) ** 0.5
        figures = {
            "rmse_hu": round(rmse, 2),
            "psnr_db": round(float(20 * np.log10((high - low) / max(rmse, 1e-6))), 2),
            "bias_hu": round(self.error / self.voxels, 2),
        }
        if self.similar_voxels:
            figures["ssim"] = round(self.similar / self.similar_voxels, 3)
        if self.noise_voxels:
            n = self.noise_voxels
            for name, total, squares in (
                ("scan_noise_hu", self.noise_in, self.noise_squared_in),
                ("reconstruction_noise_hu", self.noise_out, self.noise_squared_out),
            ):
                figures[name] = round(max(0.0, squares / n - (total / n) ** 2) ** 0.5, 2)
        figures["voxels"] = self.voxels
        return figures


class Difference:
    """How a reconstruction differs from its scan, both (X, Y, Z) in HU, clipped to the window."""

    def __init__(self, scan: Tensor, reconstruction: Tensor, window: tuple[float, float]):
        self.window = window
        self.error = reconstruction - scan
        self.noise = high_pass_noise(scan), high_pass_noise(reconstruction)
        fits = min(scan.shape) >= SSIM_SIDE
        self.ssim = ssim_map(scan, reconstruction, window[1] - window[0]) if fits else None


# -- tumours --------------------------------------------------------------------------------------


def tumor_statistics(hu: Tensor, tumor: Tensor, organ: Tensor) -> tuple[float, float, float]:
    """Measure the contrast of a tumour and the noise inside and around it.

    Args:
        hu: (X, Y, Z) in HU at 1 mm.
        tumor: (X, Y, Z) bool.
        organ: (X, Y, Z) bool.

    Returns:
        Contrast of the tumour's core to the organ 2 to 8 mm away, noise inside, noise outside, in
        HU. All are NaN where no organ lies around the tumour.
    """
    core = erode(tumor, 1)
    core = core if int(core.sum()) >= MIN_TUMOR_CORE_VOXELS else tumor
    nearest, farthest = SHELL_MM
    far = distance_mm(tumor, farthest)
    shell = organ & (far > nearest) & (far < farthest)
    if not bool(shell.any()):
        return (float("nan"),) * 3
    noise = high_pass_noise(hu)
    return (
        float(hu[core].mean()) - float(np.median(hu[shell].numpy())),
        float(noise[core].std(correction=0)),
        float(noise[shell].std(correction=0)),
    )


def summary(rows: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    """Summarise `tumor_statistics`: percentiles 5, 50 and 95 of the contrast, median noise."""
    table = np.array([row for row in rows if np.isfinite(row).all()])
    if not len(table):
        return {"tumours": 0}
    contrast, inside, outside = table.T
    return {
        "tumours": len(table),
        "contrast_hu": [round(float(v), 1) for v in np.percentile(contrast, [5, 50, 95])],
        "noise_inside_hu": round(float(np.median(inside)), 1),
        "noise_outside_hu": round(float(np.median(outside)), 1),
        "noise_ratio": round(float(np.median(inside / outside)), 2),
    }

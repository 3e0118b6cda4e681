"""Measures of volumes at 1 mm: error, SSIM, noise, distances, a tumour's contrast. Torch alone.

A machine that trains may have torch and nothing else, and a training ends with these.
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

NOISE_SIGMA_MM = 1.5  # what a Gaussian of this width leaves behind counts as noise
SSIM_SIGMA_MM, SSIM_SIDE = 1.5, 11  # Wang et al. 2004, in three dimensions


def noise_of(volume: Tensor) -> Tensor:
    """(X, Y, Z) minus itself blurred by a Gaussian of 1.5 mm; edges are mirrored."""
    radius = int(4 * NOISE_SIGMA_MM + 0.5)
    padded = volume.float()
    for axis, n in enumerate(volume.shape):
        index = torch.arange(-radius, n + radius, device=volume.device) % (2 * n)
        padded = padded.index_select(axis, torch.where(index < n, index, 2 * n - 1 - index))
    return volume - _blur(padded[None], NOISE_SIGMA_MM, radius)[0]


def ssim_map(a: Tensor, b: Tensor, value_range: float) -> Tensor:
    """Structural similarity of (X, Y, Z) volumes, Gaussian of sigma 1.5 in a window of 11.

    Returns (X - 10, Y - 10, Z - 10): voxels whose window lies inside. Raises ValueError for
    sides under 11. Wang et al., Image quality assessment, IEEE TIP 2004.
    """
    if min(a.shape) < SSIM_SIDE:
        raise ValueError(f"SSIM needs sides of at least {SSIM_SIDE} voxels, got {tuple(a.shape)}")
    # around zero: squares of HU lose the digits of their differences
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
    """(C, X, Y, Z) convolved with a Gaussian along all axes; ``radius`` less on every side."""
    weights = [math.exp(-0.5 * (far / sigma) ** 2) for far in range(-radius, radius + 1)]
    for axis in (1, 2, 3):  # shifted and summed: faster than thin convolutions
        size = volumes.shape[axis] - 2 * radius
        shifted = (
            volumes.narrow(axis, k, size) * (w / sum(weights)) for k, w in enumerate(weights)
        )
        total = next(shifted)
        for part in shifted:
            total += part
        volumes = total
    return volumes


def distance(mask: Tensor, reach: int) -> Tensor:
    """mm from each voxel (X, Y, Z) to the nearest one of the mask; exact up to ``reach``, 0 inside.

    Beyond it is larger than ``reach``, infinite where no voxel of the mask is in reach.
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


def eroded(mask: Tensor, times: int) -> Tensor:
    """The mask (X, Y, Z) less its outermost voxels (six neighbours; outside counts as none)."""
    for _ in range(times):
        whole = F.pad(mask, (1,) * 6)
        for axis, n in enumerate(mask.shape):
            line = whole  # the mask, but along this axis one voxel longer at both ends
            for other in {0, 1, 2} - {axis}:
                line = line.narrow(other, 1, mask.shape[other])
            mask = mask & line.narrow(axis, 0, n) & line.narrow(axis, 2, n)
    return mask


# -- reconstruction -------------------------------------------------------------------------------


@dataclass
class Errors:
    """Sums over the voxels of a region, crop by crop, and what they come to in the end."""

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
        """The voxels of a region (X, Y, Z) bool of one crop."""
        wrong = difference.error[region].double()
        self.voxels += wrong.numel()
        self.error += float(wrong.sum())
        self.squared += float(wrong.square().sum())
        if difference.ssim is not None:
            edge = SSIM_SIDE // 2
            similar = difference.ssim[region[edge:-edge, edge:-edge, edge:-edge]].double()
            self.similar += float(similar.sum())
            self.similar_voxels += similar.numel()
        core = eroded(region, 4)  # the edge of an organ is no noise
        if int(core.sum()) < 100:
            core = eroded(region, 1)
        before, after = (n[core].double() for n in difference.noise)
        self.noise_voxels += before.numel()
        self.noise_in += float(before.sum())
        self.noise_out += float(after.sum())
        self.noise_squared_in += float(before.square().sum())
        self.noise_squared_out += float(after.square().sum())

    def figures(self) -> dict[str, float]:
        """RMSE, bias and noise in HU, PSNR in dB with the window as its range, SSIM; JSON-able."""
        low, high = self.window
        rmse = (self.squared / self.voxels) ** 0.5
        told = {
            "rmse_hu": round(rmse, 2),
            "psnr_db": round(float(20 * np.log10((high - low) / max(rmse, 1e-6))), 2),
            "bias_hu": round(self.error / self.voxels, 2),
        }
        if self.similar_voxels:
            told["ssim"] = round(self.similar / self.similar_voxels, 3)
        if self.noise_voxels:
            n = self.noise_voxels
            for name, total, squares in (
                ("scan_noise_hu", self.noise_in, self.noise_squared_in),
                ("reconstruction_noise_hu", self.noise_out, self.noise_squared_out),
            ):
                told[name] = round(max(0.0, squares / n - (total / n) ** 2) ** 0.5, 2)
        told["voxels"] = self.voxels
        return told


class Difference:
    """How a reconstruction differs from its scan, both (X, Y, Z) in HU, clipped to the window."""

    def __init__(self, scan: Tensor, reconstruction: Tensor, window: tuple[float, float]):
        self.error = reconstruction - scan
        self.noise = noise_of(scan), noise_of(reconstruction)
        fits = min(scan.shape) >= SSIM_SIDE
        self.ssim = ssim_map(scan, reconstruction, window[1] - window[0]) if fits else None


# -- tumours --------------------------------------------------------------------------------------


def tumor_statistics(hu: Tensor, tumor: Tensor, organ: Tensor) -> tuple[float, float, float]:
    """Contrast of a tumour's core to the organ 2 to 8 mm away, and noise inside and outside, HU.

    hu: (X, Y, Z). tumor, organ: bool. NaN where no organ lies around the tumour.
    """
    core = eroded(tumor, 1)
    core = core if int(core.sum()) >= 20 else tumor
    far = distance(tumor, 8)
    shell = organ & (far > 2) & (far < 8)
    if not bool(shell.any()):
        return (float("nan"),) * 3
    noise = noise_of(hu)
    return (
        float(hu[core].mean()) - float(np.median(hu[shell].numpy())),
        float(noise[core].std(correction=0)),
        float(noise[shell].std(correction=0)),
    )


def summary(rows: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    """Percentiles 5, 50 and 95 of the contrast, medians of the noise; of `tumor_statistics`."""
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

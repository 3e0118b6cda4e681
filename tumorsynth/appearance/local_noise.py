"""Separate a scan's noise from its structure, voxel by voxel (after Wiener and Lee 1980)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

WINDOW_MM = 2.0  # half width of the window for local statistics
EVEN_QUANTILE = 0.1  # this share of an organ, the most even one, is taken to show noise alone
MAX_QUANTILE_VOXELS = 50_000  # the quantile is taken over about this many voxels
MIN_VARIANCE = 1e-12


class LocalNoise(NamedTuple):
    """What `separate_noise` returns.

    Args:
        mean: (X, Y, Z), local means.
        structure: share of each voxel's deviation from the mean that is structure: 0 where only
            noise is seen, towards 1 at edges.
    """

    mean: Tensor
    structure: Tensor


def separate_noise(
    values: Tensor, organ: Tensor, spacing: Sequence[float], signal_ratio: float
) -> LocalNoise:
    """Estimate how much of each voxel's deviation from its surroundings is noise.

    Callers that move or replace tissue leave noise in place: interpolated, it would be smoother
    where a value comes from between voxels than where it does not, a pattern that scans do not
    have.

    Args:
        values: (X, Y, Z).
        organ: bool, same shape; its most even part gives the noise's variance. Everything counts
            where it is empty.
        spacing: mm per voxel.
        signal_ratio: variance, over that of the noise, above which a voxel shows structure.
    """
    size = [2 * round(WINDOW_MM / s) + 1 for s in spacing]
    offset = values.mean()  # float32 has few digits for the squares of 1000 HU
    mean = _box_mean(values - offset, size)
    variance = _box_mean((values - offset).square(), size) - mean.square()
    variance = variance.clamp_min(MIN_VARIANCE)
    mean = mean + offset
    sample = variance[organ] if bool(organ.any()) else variance.flatten()
    sample = sample[:: 1 + len(sample) // MAX_QUANTILE_VOXELS]
    noise = sample.nanquantile(EVEN_QUANTILE)  # vessels and edges have more
    return LocalNoise(mean, (1 - (signal_ratio * noise / variance).square()).clamp_min(0))


def _box_mean(values: Tensor, size: Sequence[int]) -> Tensor:
    """Mean over a box of odd sides, of the part of it inside the volume (X, Y, Z).

    The box is cut to the volume's sides, since torch's filter cannot be longer.
    """
    out = values[None, None]
    for axis, (side, n) in enumerate(zip(size, values.shape, strict=True)):
        side = min(side, n - (n + 1) % 2)
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = side, side // 2
        if side > 1:
            out = F.avg_pool3d(out, kernel, 1, padding, count_include_pad=False)
    return out[0, 0]

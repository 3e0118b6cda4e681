"""Subvoxels: the fine grid that a tumour is drawn on where a scan's voxels are coarse.

A scanner averages over each voxel. Where voxels are large, a tumour is therefore drawn on subvoxels
and its change averaged over them (partial volume): a ball of 5 mm fills at most 5 / 8 of a slice of
8 mm, and shows that share of its contrast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from tumorsynth.geometry import Box, Frame, Ints3, ints3

ONE = (1, 1, 1)
MAX_FINE_VOXEL_MM = 1.5  # voxels up to this side are fine enough for all but tiny tumours
MAX_SUBVOXEL_MM = 1.0
MIN_VOXELS_ACROSS = 3  # of a tumour; with fewer, its voxels are coarse whatever their size
MIN_SUBVOXELS_ACROSS = 6
MAX_FACTOR = 15  # subvoxels along an axis of a voxel, to bound memory


def subvoxel_factors(spacing: Sequence[float], diameter_mm: float) -> Ints3:
    """Return into how many subvoxels a voxel is divided along each axis; 1 where it is fine.

    Args:
        spacing: mm per voxel.
        diameter_mm: the tumour's equivalent diameter.
    """
    side = min(MAX_SUBVOXEL_MM, diameter_mm / MIN_SUBVOXELS_ACROSS)
    coarse = min(MAX_FINE_VOXEL_MM, diameter_mm / MIN_VOXELS_ACROSS)
    return ints3(
        # odd: of an even number exactly half may be filled, and labels would come out too large
        1 if s <= coarse else min(MAX_FACTOR, 2 * math.ceil((s / side - 1) / 2) + 1)
        for s in spacing
    )


def refine_box(box: Box, factors: Ints3) -> Box:
    """Return the subvoxels of a box of voxels."""
    if factors == ONE:
        return box
    return Box(
        ints3(a * k for a, k in zip(box.start, factors, strict=True)),
        ints3(b * k for b, k in zip(box.stop, factors, strict=True)),
    )


def refine_spacing(spacing: Sequence[float], factors: Ints3) -> tuple[float, float, float]:
    """Return mm per subvoxel."""
    x, y, z = (s / k for s, k in zip(spacing, factors, strict=True))
    return x, y, z


def refine_frame(frame: Frame, factors: Ints3) -> Frame:
    """Return how a sample's subvoxels lie in the patient; without the affine."""
    if factors == ONE:
        return frame
    return replace(frame, spacing=refine_spacing(frame.spacing, factors), affine=None)


def repeat_voxels(volume: Tensor, factors: Ints3) -> Tensor:
    """Give each subvoxel its voxel's value.

    Args:
        volume: (X, Y, Z).
        factors: subvoxels per voxel along each axis.
    """
    for axis, factor in enumerate(factors):
        if factor > 1:
            volume = volume.repeat_interleave(factor, axis)
    return volume


def average_subvoxels(volume: Tensor, factors: Ints3) -> Tensor:
    """Return the mean of each voxel's subvoxels.

    Args:
        volume: (X, Y, Z) on subvoxels, floating point.
        factors: subvoxels per voxel along each axis.
    """
    if factors == ONE:
        return volume
    sides = [part for n, k in zip(volume.shape, factors, strict=True) for part in (n // k, k)]
    return volume.reshape(sides).mean((1, 3, 5))

"""Surface Dice of two masks, with NumPy and SciPy alone.

The definition is that of Nikolov et al. (arXiv 1809.04430): the share of both surfaces, by area,
that lies within a tolerance of the other. Surface elements sit between voxels, one in each cell of
2 x 2 x 2 voxels that is partly filled. Their area follows from the gradient over the cell, which
needs no table of marching cubes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from tumorsynth.evaluation.boxes import crop_to_content


def surface_dice(
    predicted: np.ndarray, real: np.ndarray, spacing: Sequence[float], tolerance_mm: float = 2.0
) -> float:
    """Return the surface Dice of two masks, of which at least one is not empty.

    Args:
        predicted: bool, (X, Y, Z). A face at the array's border is a surface.
        real: the same.
        spacing: mm per voxel.
        tolerance_mm: distance up to which surfaces count as equal.
    """
    masks = crop_to_content(predicted, real)
    fits = total = 0.0
    areas = [_element_areas(mask, spacing) for mask in masks]
    surfaces = [_partly_filled(mask) for mask in masks]
    for own, area, other in zip(surfaces, areas, reversed(surfaces), strict=True):
        total += area[own].sum()
        if own.any() and other.any():
            distance = ndimage.distance_transform_edt(~other, sampling=spacing)
            fits += area[own & (distance <= tolerance_mm)].sum()
    return float(fits / total)


def straighten(
    mask: np.ndarray, spacing: np.ndarray, shear: Sequence[Sequence[float]]
) -> np.ndarray:
    """Resample a mask on a sheared grid to right-angled axes, with the same spacing."""
    to_mm = np.array(shear) * spacing
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(mask.shape) + 1) - 1
    in_mm = corners @ to_mm.T
    start = in_mm.min(0)
    shape = np.ceil((in_mm.max(0) - start) / spacing).astype(int) + 1
    to_voxel = np.linalg.inv(to_mm)
    share = ndimage.affine_transform(
        mask.astype(np.float32),
        to_voxel * spacing,
        to_voxel @ start,
        tuple(shape),
        order=1,
        mode="grid-constant",
    )
    straight: np.ndarray = share >= 0.5
    return straight


def _corner_sums(mask: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Sum neighbours along some axes."""
    for axis in axes:
        low, high = _halves(axis)
        mask = mask[low] + mask[high]
    return mask


def _halves(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    low, high = [slice(None)] * 3, [slice(None)] * 3
    low[axis], high[axis] = slice(None, -1), slice(1, None)
    return tuple(low), tuple(high)


def _partly_filled(mask: np.ndarray) -> np.ndarray:
    corners = _corner_sums(mask.astype(np.int8), range(3))
    return (corners > 0) & (corners < 8)


def _element_areas(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return mm2 of surface in each cell: its volume times the length of the gradient in it."""
    values = mask.astype(np.int8)
    squares = np.zeros([side - 1 for side in mask.shape])
    for axis in range(3):
        low, high = _halves(axis)
        difference = _corner_sums(values[high] - values[low], [a for a in range(3) if a != axis])
        squares += (difference / (4 * spacing[axis])) ** 2
    return np.sqrt(squares) * float(np.prod(spacing))

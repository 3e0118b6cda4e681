"""Which affines say nothing about the size of a voxel: those that libraries write by default.

They take voxels of 1 mm and place the array without knowing where: at the origin along the
patient's axes (NumPy, MONAI and TorchIO: the identity) or along those of ITK (-x, -y, z), or with
its centre at the origin (nibabel). A flip or other axes of the whole array, a crop and a pad are
told by whole mm. A scanner places its voxels around its own centre. This does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDING = 1e-4  # of a matrix that several transforms multiplied; voxels, mm
MAX_PADDED_SHARE = 0.25  # of the voxels along an axis that were padded in front of the array


def stands_for_none(affine: np.ndarray, shape: Sequence[int]) -> bool:
    """Return whether a file's affine is one that stands for none, or a part of such an array.

    Args:
        affine: 4x4, voxel to mm.
        shape: voxels along the three axes.
    """
    linear, first = affine[:3, :3], affine[:3, 3]
    if not turns_only(linear):
        return False
    last = last_voxel(affine, shape)
    if (np.abs(first + last) < ROUNDING).all():  # centred
        return True
    if not is_whole(first):
        return False
    at_corner = (np.abs(first) < ROUNDING) | (np.abs(last) < ROUNDING)
    cropped = linear.T @ first  # voxels along the array's own axes; below 0 they were padded
    return bool(at_corner.all() or (cropped > -MAX_PADDED_SHARE * np.asarray(shape)).all())


def turns_only(linear: np.ndarray) -> bool:
    """Return whether a 3x3 matrix permutes and flips axes, and no more."""
    return is_axis_aligned(linear) and bool(np.abs(np.abs(linear).sum(1) - 1).max() < ROUNDING)


def is_axis_aligned(linear: np.ndarray) -> bool:
    """Return whether a 3x3 matrix permutes, flips and scales axes, and no more."""
    used = np.abs(linear) > ROUNDING
    return bool((used.sum(0) == 1).all() and (used.sum(1) == 1).all())


def is_whole(values: np.ndarray) -> bool:
    """Return whether numbers are whole, but for rounding."""
    return bool((np.abs(values - np.round(values)) < ROUNDING).all())


def last_voxel(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return where the last voxel of a volume lies, in mm."""
    return affine[:3, 3] + affine[:3, :3] @ (np.asarray(shape) - 1)

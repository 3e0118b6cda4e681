"""What affines say of each other: voxel sizes, directions, and how far apart two grids lie.

It does not import torch, so that the command line starts quickly.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_SHIFT_VOXELS = 0.1  # between two affines of one grid: files round them, tools recompute them
MAX_SIZE_DIFFERENCE = 0.01  # share of a voxel size that counts as rounding
MAX_ANGLE_COSINE = 0.9998  # about one degree between two directions that count as one


def to_array(affine: Any) -> np.ndarray:
    """Return an affine, or a batch of affines, as an array of floats on the CPU."""
    if hasattr(affine, "detach"):  # a tensor
        affine = affine.detach().cpu().numpy()
    return np.asarray(affine, dtype=float)


def is_identity(affine: np.ndarray) -> bool:
    """Return whether the linear part of a 4x4 affine is exactly the identity.

    Libraries use it where they know no affine; a crop then changes its origin alone.
    """
    return bool((affine[:3, :3] == np.eye(3)).all())


def voxel_sizes(affine: np.ndarray) -> np.ndarray:
    """Return the lengths of an affine's three columns, in mm."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def sizes_agree(first: Any, second: Any) -> bool:
    """Return whether two voxel sizes differ by rounding only."""
    first, second = np.asarray(first), np.asarray(second)
    return bool((np.abs(first - second) <= MAX_SIZE_DIFFERENCE * second).all())


def directions_agree(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether the axes of two affines point the same way, but for rounding."""
    cosines = (first[:3, :3] * second[:3, :3]).sum(0) / (voxel_sizes(first) * voxel_sizes(second))
    return bool((cosines > MAX_ANGLE_COSINE).all())


def largest_shift(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """Return how far apart two affines put a corner voxel of a volume, at most.

    Args:
        first: 4x4, invertible.
        second: 4x4.
        shape: voxels of the volume along its three axes.

    Returns:
        The distance along an axis of ``first``, in its voxels; infinity where an affine is not
        finite.
    """
    if np.array_equal(first, second):
        return 0.0
    difference = second[:3] - first[:3]
    if not np.isfinite(difference).all():
        return float("inf")
    corners = np.array(list(itertools.product(*((0, n - 1) for n in shape))))
    mm = difference[:, :3] @ corners.T + difference[:, 3:]
    return float(np.abs(np.linalg.pinv(first[:3, :3]) @ mm).max())
